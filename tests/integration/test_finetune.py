"""The whole flow on a small scale: real servers, real torchrun, the real model's first four layers (the demo has all thirty)."""

import json
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.tracking import MlflowClient
from peft import PeftModel

from flows.local_stack import REPOSITORY
from tasks.contracts.files import read_json, write_json
from tasks.contracts.settings import GateSettings
from tasks.models.load import load_model
from tests.dataset.reading import write_jsonl
from tests.dataset.test_prepare import as_format
from tests.dataset.test_split import various_rows
from tests.integration.finetune_process import STAGES, finish, mlflow_statuses, prefect_states, start

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def test_a_run_from_rows_to_report(first_run, storage, stack):
    code, output, latest = first_run
    # The small run cannot pass the gates, and must say so.
    assert code == 3, output
    run = storage / "runs" / "first"
    assert latest == run
    comparison = read_json(run / "report" / "comparison.json")
    assert not comparison["passed"]
    assert not {gate["name"]: gate["passed"] for gate in comparison["gates"]}["min_requests"]
    for name in ("comparison.md", "comparison.html", "figures/exact_match.svg"):
        assert (run / "report" / name).stat().st_size > 100
    assert list((run / "training" / "adapter").glob("*.safetensors"))
    assert not [f for f in (run / "training" / "adapter").iterdir() if f.suffix in (".bin", ".pt", ".pkl")]
    state, tasks = prefect_states(stack, "first")
    assert state == "GatesFailed"
    assert tasks == dict.fromkeys(STAGES, "Completed")
    status, children = mlflow_statuses(stack, "first")
    assert status == "FAILED"
    assert children == dict.fromkeys(STAGES, "FINISHED")


def logits(base: Path, adapter: Path | None) -> torch.Tensor:
    """Of a few tokens, as plain PEFT computes them."""
    model = load_model(base, "float32")
    with torch.inference_mode():
        return (model if adapter is None else PeftModel.from_pretrained(model, adapter))(
            torch.tensor([[5, 6, 7]])
        ).logits


def test_mlflow_has_curves_params_datasets_artifacts_and_the_model(
    first_run, storage, stack, small_model, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stack.mlflow)
    client = MlflowClient(stack.mlflow)
    experiment = client.get_experiment_by_name("finetune").experiment_id
    parent = client.search_runs([experiment], "attributes.run_name = 'first'")[0]
    runs = {
        r.info.run_name: r
        for r in client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    }
    assert parent.data.params["training.lora.rank"] == "16"
    assert parent.inputs.dataset_inputs[0].dataset.name == "embedded"
    training = runs["train_adapter"]
    curve = client.get_metric_history(training.info.run_id, "train/loss")
    assert [point.step for point in curve] == [1, 2, 3, 4, 5, 6]
    before, after = runs["run_inference_baseline"].data.metrics, runs["run_inference_finetuned"].data.metrics
    only_one = {name for name in before.keys() ^ after.keys() if name.startswith("eval/")}
    # Of a model that calls nothing there is nothing to say about its calls.
    assert {name.rpartition("/")[2] for name in only_one} <= {"fits_schema", "arguments_given"}
    artifacts = {artifact.path for artifact in client.list_artifacts(training.info.run_id, "adapter")}
    assert "adapter/adapter_model.safetensors" in artifacts
    (version,) = client.search_model_versions(f"run_id = '{training.info.run_id}'")
    assert version.tags["base_weights_sha256"] == training.data.tags["base_weights_sha256"]
    assert "exact_match" in version.tags
    assert "stays candidate: its gates did not pass" in client.get_run(parent.info.run_id).data.tags["registered"]
    # The very adapter that was trained comes back out of the registry.
    source = client.get_model_version_download_uri(version.name, version.version)
    registered = Path(mlflow.artifacts.download_artifacts(source, dst_path=str(tmp_path), tracking_uri=stack.mlflow))
    trained = storage / "runs" / "first" / "training" / "adapter"
    weights = "adapter_model.safetensors"
    assert (registered / weights).read_bytes() == (trained / weights).read_bytes()
    original, ours, theirs = (logits(small_model, adapter) for adapter in (None, trained, registered))
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, original)
    tables = [
        mlflow.artifacts.load_dict(f"{runs[name].info.artifact_uri}/evaluation.json")
        for name in ("run_inference_baseline", "run_inference_finetuned")
    ]
    assert tables[0]["columns"] == tables[1]["columns"]
    assert [row[0] for row in tables[0]["data"]] == [row[0] for row in tables[1]["data"]]
    for name in ("eval/reference_loss", "eval/plain_loss", "inference/latency_p95_s", "inference/peak_memory_gbytes"):
        assert before[name] > 0
    assert after["eval/reference_loss"] < before["eval/reference_loss"]
    assert version.name.startswith("function-calling-")
    assert version.name.endswith(small_model.name)
    candidate = client.get_model_version_by_alias(version.name, "candidate")
    assert int(candidate.version) >= int(version.version)
    assert client.get_registered_model(version.name).aliases.keys() == {"candidate"}


def test_one_process_answers_what_two_do(first_run, storage, tmp_path):
    """Data parallelism deals out other batches, and must change no answer."""
    (two,) = (storage / "runs" / "first" / "jobs" / "run_inference_baseline").glob("*/spec.json")
    spec = read_json(two)
    assert spec["num_nodes"] == 2
    attempt, alone = tmp_path / "job" / "001", tmp_path / "alone"
    attempt.mkdir(parents=True)
    write_json(attempt / "spec.json", spec | {"arguments": spec["arguments"] | {"output": str(alone)}})
    (attempt.parent / "NEWEST").write_text("001")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--module", "tasks.inference"]
    subprocess.run([*command, attempt / "spec.json"], cwd=REPOSITORY, check=True, timeout=300)
    answers = [
        {row["example_id"]: row["text"] for row in pq.read_table(folder / "predictions.parquet").to_pylist()}
        for folder in (Path(spec["arguments"]["output"]), alone)
    ]
    assert answers[0] == answers[1]
    assert len(set(answers[0].values())) > 1


def test_a_control_run_on_shuffled_answers_reuses_the_rest_and_claims_no_improvement(
    first_run, start_small, storage, stack
):
    code, output = finish(start_small("shuffled", training__shuffle_answers="true"))
    assert code == 3, output
    assert output.count("reusing") == 2
    _, tasks = prefect_states(stack, "shuffled")
    assert tasks["prepare_dataset"] == "Cached"
    assert tasks["run_inference_baseline"] == "Cached"
    assert tasks["run_inference_finetuned"] == "Completed"
    comparison = read_json(storage / "runs" / "shuffled" / "report" / "comparison.json")
    assert not comparison["is_improvement"]
    assert comparison["statement"].startswith("No improvement")


def test_the_original_compared_with_itself_is_no_improvement_on_rows_from_several_files(start_small, storage, tmp_path):
    """Two files of the user's own, of other kinds and formats, mixed."""
    rows = various_rows(300)
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "rows.jsonl", rows[:200])
    pq.write_table(pa.Table.from_pylist([_as_hermes(row) for row in rows[200:]]), tmp_path / "more.parquet")
    sources = [{"name": str(tmp_path / "folder"), "weight": 2}, {"name": str(tmp_path / "more.parquet"), "weight": 1}]
    settings = {"inference__adapter": "none", "training__max_steps_per_epoch": 2, "dataset__unseen_tools_share": 0.2}
    code, output = finish(start_small("itself", dataset__sources=json.dumps(sources), **settings))
    assert code == 3, output
    quality = read_json(storage / "runs" / "itself" / "dataset" / "quality.json")
    assert [counts["taught"] for counts in quality["sources"].values()] == [16, 8]
    comparison = read_json(storage / "runs" / "itself" / "report" / "comparison.json")
    primary = comparison["groups"][0]["paired"]
    assert (primary["difference"], primary["p_value"]) == (0, 1)
    assert not comparison["is_improvement"]


def _as_hermes(row):
    request, call = row["messages"][0]["content"], row["messages"][1]["tool_calls"][0]["function"]
    return as_format("hermes", request, row["tools"][0]["function"], call)


def test_the_champion_is_asked_the_same_requests_and_loses_or_keeps_its_title(first_run, start_small, storage, stack):
    client = MlflowClient(stack.mlflow)
    name = next(m.name for m in client.search_registered_models() if m.name.endswith("four-layers"))
    trained = storage / "runs" / "first" / "training" / "adapter" / "adapter_model.safetensors"
    champion = next(v for v in client.search_model_versions(f"name = '{name}'") if v.tags["run"] == "first")
    client.set_registered_model_alias(name, "champion", champion.version)
    no_gates = {f"gates__{gate}": "null" for gate in GateSettings.model_fields if gate != "max_out_of_memory"}
    try:
        code, output = finish(start_small("challenger", ask_champion=True, training__seed=8, **no_gates))
        aliases = client.get_registered_model(name).aliases
    finally:
        client.delete_registered_model_alias(name, "champion")
    assert code == 0, output
    run = storage / "runs" / "challenger"
    asked = read_json(run / "jobs" / "run_inference_champion" / "001" / "spec.json")["arguments"]
    assert (Path(asked["adapter"]) / "adapter_model.safetensors").read_bytes() == trained.read_bytes()
    answers, ours = (
        {row["example_id"] for row in pq.read_table(run / "inference" / which / "predictions.parquet").to_pylist()}
        for which in ("champion", "finetuned")
    )
    assert answers == ours
    against = read_json(run / "report" / "comparison.json")["champion"]
    assert against["version"] == f"{name} version {champion.version}"
    assert against["statement"] in (run / "report" / "comparison.md").read_text()
    paired = against["paired"]
    assert paired["n"] > 0
    # Both are four layers that cannot call; whichever is better bears the title.
    is_better = paired["num_fixed"] > paired["num_broken"]
    assert (aliases["champion"] == aliases["candidate"]) == is_better
    status, children = mlflow_statuses(stack, "challenger")
    assert (status, children["run_inference_champion"]) == ("FINISHED", "FINISHED")
    said = "is champion: " if is_better else "stays candidate: not "
    assert f"{said}right more often than {against['version']}, of {paired['n']} requests" in output
    assert re.search(r"^run_inference_champion +\d", output, re.M)


def test_settings_that_cannot_be_used_are_all_reported_and_nothing_starts(storage, stack):
    process = start(
        storage, stack, "bad", model__name="/no/such/model", dataset__max_rows=13, training__warmup_steps=500
    )
    code, output = finish(process)
    assert code == 2
    assert "/no/such/model" in output
    assert "do not fill one global batch" in output
    assert "Traceback" not in output
    assert not (storage / "runs" / "bad").exists()


def test_a_run_is_resumed_with_the_settings_it_was_started_with_or_not_at_all(first_run, start_small, storage):
    before = (storage / "runs" / "first" / "experiment.json").read_text()
    code, output = finish(
        start_small("first", pool__num_nodes=2, training__lora__rank=4, training__per_device_batch_size=1)
    )
    assert code == 2
    assert "training.lora.rank=4: run first was started with 16" in output
    assert "per_device_batch_size=1:" not in output
    assert (storage / "runs" / "first" / "experiment.json").read_text() == before


def test_an_unknown_deployment_lists_those_there_are(storage, stack):
    done = subprocess.run(
        [sys.executable, "-m", "flows.finetune", "nothing"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "demo, demo-slurm, poc, poc-qwen2-7b, poc-reference" in done.stderr
