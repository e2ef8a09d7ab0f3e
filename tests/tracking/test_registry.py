"""The registry with MLflow's own store: aliases move as said, and the evaluation table is one that the UI knows."""

import pytest

from tasks.tracking.mlflow_runs import Tracking

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def test_the_champion_moves_only_to_a_version_that_beats_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracking = Tracking(f"sqlite:///{tmp_path}/mlflow.db")
    run = tracking.start_child(tracking.start_parent("run", {}), "train_adapter", {})
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    tracking.log_folder(run, tmp_path / "adapter", "adapter")
    assert tracking.champion_of("embedded") is None
    champions = []
    for exact_match, passed in (("0.9", True), ("0.8", True), ("0.99", False), ("0.95", True)):
        tags = {"dataset_sha256": "d", "exact_match": exact_match}
        tracking.register_adapter(model="embedded", run_id=run, tags=tags, passed=passed)
        aliases = tracking.client.get_registered_model("function-calling-embedded").aliases
        champions.append((int(aliases["candidate"]), int(aliases["champion"])))
    assert champions == [(1, 1), (2, 1), (3, 1), (4, 4)]
    champion = tracking.champion_of("embedded")
    assert champion.title == "function-calling-embedded version 4"
    assert champion.tags["exact_match"] == "0.95"
    tracking.fetch_adapter(champion, tmp_path / "fetched")
    assert [file.name for file in (tmp_path / "fetched").iterdir()] == ["adapter_model.safetensors"]
    assert (tmp_path / "fetched" / "adapter_model.safetensors").read_bytes() == b"weights"
    tracking.log_table(run, {"request": ("q",), "answer": ("a",)}, "evaluation.json")
    assert '"type": "table"' in tracking.client.get_run(run).data.tags["mlflow.loggedArtifacts"]
