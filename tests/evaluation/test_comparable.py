"""Answers in different number formats are not compared."""

import pytest

from tasks.compare_models import check_comparable
from tasks.contracts.files import write_json
from tasks.run_inference import Answers


def test_answers_in_two_precisions_are_refused_with_the_next_step(tmp_path):
    for name, precision in (("original", "bfloat16"), ("same", "bfloat16"), ("other", "float32")):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "manifest.json", {"precision": precision})
    original, same, other = (Answers(str(tmp_path / name), "", reused=False) for name in ("original", "same", "other"))
    check_comparable("original", original, same)
    with pytest.raises(
        ValueError, match="champion model .* bfloat16 .* set inference.precision=float32, and the champion"
    ):
        check_comparable("champion", original, other)
