"""The champion's adapter on its way to being asked: there, not there, of another base, gone."""

import shutil
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.logging import disable_run_logger

from flows.finetune import _of_champion
from tasks.contracts.run_folder import RunFolder
from tasks.contracts.settings import Experiment, StorageSettings
from tasks.fetch_champion import Champion, fetch_champion
from tasks.pool.supervise import Interrupted
from tasks.tracking.mlflow_runs import Tracking

pytestmark = pytest.mark.filterwarnings("ignore")
OURS = SimpleNamespace(figures={"base_weights_sha256": "base"})


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = SimpleNamespace(model=SimpleNamespace(name="m"))
    folder = RunFolder(StorageSettings(shared=str(tmp_path)), "run")
    folder.root.mkdir(parents=True)
    return SimpleNamespace(experiment=experiment, folder=folder, tracking=Tracking(f"sqlite:///{tmp_path}/mlflow.db"))


def crown(run: Any, weights: bytes, base: str = "base", file: str = "adapter_model.safetensors") -> str:
    """A new champion; where its files are."""
    tracking, place = run.tracking, run.folder.root / "made"
    place.mkdir(exist_ok=True)
    (place / file).write_bytes(weights)
    parent = tracking.start_child(tracking.start_parent("other", {}), "train_adapter", {})
    tracking.log_folder(parent, place, "adapter")
    shutil.rmtree(place)
    version, _ = tracking.register_adapter(model="m", run_id=parent, tags={"base_weights_sha256": base}, passed=True)
    tracking.client.set_registered_model_alias("function-calling-m", "champion", version.rpartition(" ")[2])
    return tracking.champion_of("m").source.removeprefix("file://")


def fetch(run: Any) -> Any:
    with disable_run_logger():
        return fetch_champion.fn(run, OURS)


def test_the_present_champion_is_brought_and_stays_the_one_that_a_run_asks(run, tmp_path):
    assert fetch(run) is None
    crown(run, b"first")
    champion = fetch(run)
    assert champion.version == "function-calling-m version 1"
    crown(run, b"second")
    again = fetch(run)
    assert again == champion
    assert (tmp_path / "runs" / "run" / "champion" / "adapter" / "adapter_model.safetensors").read_bytes() == b"first"


def test_one_of_another_base_is_not_asked(run):
    crown(run, b"first", base="another")
    champion = fetch(run)
    assert (champion.path, champion.version) == (None, "function-calling-m version 1")
    assert champion.why_not == "it is of other base weights, another, and these are base"
    assert not run.folder.champion.exists()


def test_one_whose_files_are_gone_or_none_of_an_adapter_ends_nothing(run):
    shutil.rmtree(crown(run, b"first"))
    gone = fetch(run)
    assert (gone.path, "its files cannot be had from" in gone.why_not) == (None, True)
    crown(run, b"pickled", file="adapter_model.bin")
    assert "has no safetensors" in fetch(run).why_not
    assert not run.folder.champion.exists()
    # Once they are there it is asked after all.
    crown(run, b"third")
    assert fetch(run).version == "function-calling-m version 3"


@pytest.mark.parametrize(
    ("inference", "said"),
    [
        ({"engine": "openai", "endpoint": {"url": "http://h", "original": "a", "finetuned": "b"}}, "engine=openai"),
        ({"adapter": "none"}, "inference.adapter=none"),
    ],
)
def test_settings_with_which_there_would_be_nothing_to_compare_are_refused(inference, said):
    values = {
        "model": {"name": "m"},
        "dataset": {"sources": [{"name": "embedded"}], "max_rows": 420},
        "inference": inference,
    }
    Experiment.model_validate(values)
    with pytest.raises(ValueError, match=f"ask_champion=true with .*{said}"):
        Experiment.model_validate(values | {"ask_champion": True})


class Ended:
    """A stage that has ended, as a future."""

    def __init__(self, value: object) -> None:
        self.value = value

    def result(self) -> Any:
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value


def test_a_champion_whose_job_failed_ends_nothing_and_a_stop_still_does():
    champion, answers = Champion("there", "m version 1"), object()
    with disable_run_logger():
        assert _of_champion(None, None) == (None, None)
        assert _of_champion(Ended(champion), Ended(answers)) == (champion, answers)
        unasked, none = _of_champion(Ended(champion), Ended(RuntimeError("no node left")))
        assert (unasked.version, unasked.why_not, none) == ("m version 1", "its job failed: no node left", None)
        assert _of_champion(Ended(None), Ended(None)) == (None, None)
        with pytest.raises(Interrupted):
            _of_champion(Ended(champion), Ended(Interrupted("stopped")))
