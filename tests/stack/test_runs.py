"""What the stack's test takes for a whole run: nothing seen is not good."""

import pytest

from tests.stack.__main__ import is_as_before
from tests.stack.runs import Ended


@pytest.mark.parametrize(
    ("attempts", "is_whole"), [({}, False), ({"train_adapter": 1}, True), ({"train_adapter": 2}, False)]
)
def test_a_run_is_whole_with_one_attempt_of_each_stage(attempts, is_whole):
    assert Ended("Completed", "", ["FINISHED"], attempts).is_whole is is_whole


def test_a_backup_of_a_run_without_metrics_has_shown_nothing():
    seen = {"prefect": "Completed", "tiny/epochs": "1", "tiny/artifacts": []}
    assert not is_as_before(seen, dict(seen))
    assert is_as_before(seen | {"tiny/loss": 0.5}, seen | {"tiny/loss": 0.5})
    assert not is_as_before(seen | {"tiny/loss": 0.5}, seen)
