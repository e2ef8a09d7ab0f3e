"""Answers in different number formats are not compared."""

import pytest

from tasks.compare_models import check_comparable
from tasks.contracts.files import write_json


def test_answers_in_two_precisions_are_refused_with_the_next_step(tmp_path):
    for name, precision in (("original", "bfloat16"), ("same", "bfloat16"), ("other", "float32")):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "manifest.json", {"precision": precision})
    check_comparable(tmp_path / "original", tmp_path / "same")
    with pytest.raises(ValueError, match="answered in bfloat16 .* in float32 .* set inference.precision=float32"):
        check_comparable(tmp_path / "original", tmp_path / "other")
