"""What a stage says of its end."""

import logging
from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException

from tasks import stage
from tasks.pool.supervise import Interrupted


class Silent:
    """A tracking server that went away after the stage began; remembers what it was told."""

    def __init__(self, is_away: bool) -> None:
        self.is_away, self.ended = is_away, []
        self.client = SimpleNamespace(set_tag=lambda *told: None)

    def start_child(self, *told):
        return "child"

    def end(self, child, status):
        if self.is_away:
            raise MlflowException("connection refused")
        self.ended.append(status)

    def log_files(self, *told):
        pass


@pytest.mark.parametrize("error", [ValueError("the cause"), Interrupted("the cause"), KeyboardInterrupt("the cause")])
def test_an_mlflow_that_is_away_does_not_take_the_place_of_what_went_wrong(error, monkeypatch, caplog):
    monkeypatch.setattr(stage, "get_run_logger", lambda: logging.getLogger("stage"))
    run = SimpleNamespace(tracking=Silent(is_away=True), mlflow_run_id="parent")
    with pytest.raises(type(error), match="the cause"), stage.child_run(run, "compare_models"):
        raise error
    assert "connection refused" in caplog.text


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError(), "FAILED"), (Interrupted(), "KILLED"), (KeyboardInterrupt(), "KILLED")]
)
def test_who_was_stopped_is_killed_and_who_failed_is_failed(error, status):
    tracking = Silent(is_away=False)
    run = SimpleNamespace(tracking=tracking, mlflow_run_id="parent")
    with pytest.raises(type(error)), stage.child_run(run, "compare_models"):
        raise error
    assert tracking.ended == [status]
