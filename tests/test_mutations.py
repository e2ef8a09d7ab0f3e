"""The list of ``python -m tests.mutations`` keeps up with the files that it breaks."""

import pytest

from tests.conftest import REPOSITORY
from tests.mutations import MUTATIONS, Mutation, is_seen


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.file}: {m.before.strip()}")
def test_there_is_still_something_to_break(mutation):
    text = (REPOSITORY / mutation.file).read_text()
    assert mutation.before in text
    assert text.replace(mutation.before, mutation.after) != text
    assert (REPOSITORY / mutation.tests).exists()


@pytest.mark.parametrize(("sees", "expected"), [("assert 'whole' in text", True), ("assert text", False)])
def test_a_mutation_that_no_test_minds_is_told_from_one_that_is_seen_and_the_file_is_mended(tmp_path, sees, expected):
    (tmp_path / "file").write_text("a whole file")
    (tmp_path / "test_it.py").write_text(f"def test_it():\n    text = open('file').read()\n    {sees}\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    assert is_seen(Mutation("file", "whole", "half", "test_it.py"), tmp_path) is expected
    assert (tmp_path / "file").read_text() == "a whole file"
