"""The whole flow on a small scale: real servers, real torchrun, the real model."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from flows.local_stack import REPOSITORY, Addresses, temporary_stack
from tasks.contracts.files import read_json
from tests.processes import processes_under

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

SMALL = {
    "dataset.max_rows": 36,
    "dataset.num_test_rows": 10,
    "dataset.num_unseen_tools_rows": 2,
    "training.global_batch_size": 4,
    "training.per_device_batch_size": 2,
    "training.warmup_steps": 0,
    "training.save_every_steps": 2,
    "training.log_every_steps": 1,
    "inference.max_new_tokens": 48,
}
STAGES = {"prepare_dataset", "run_inference_baseline", "train_adapter", "run_inference_finetuned", "compare_models"}


@pytest.fixture(scope="module")
def storage(model_storage) -> Path:
    return model_storage


@pytest.fixture(scope="module")
def stack(storage):
    with temporary_stack(storage) as addresses:
        yield addresses


def start(storage: Path, stack: Addresses, run: str, **settings) -> subprocess.Popen:
    values = SMALL | {"storage.shared": storage} | {k.replace("__", "."): v for k, v in settings.items()}
    command = [sys.executable, "-m", "flows.finetune", "demo", "--run", run]
    for name, value in values.items():
        command += ["--set", f"{name}={value}"]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=os.environ | stack.environment() | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell starts background commands with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=400)
    print(output)
    return process.returncode, output


def wait_for_line(log: Path, text: str, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if any(text in file.read_text() for file in log.glob("*/node-0.log")):
            return
        time.sleep(0.1)
    pytest.fail(f"{text!r} never appeared in {log}")


def _stage(task_run_name: str) -> str:
    """Prefect adds a suffix to the names it makes up; the inference stages have names of ours."""
    is_ours = task_run_name.startswith("run_inference-")
    return task_run_name.replace("-", "_") if is_ours else task_run_name.rsplit("-", 1)[0]


def prefect_states(stack: Addresses, run: str) -> tuple[str, dict[str, str]]:
    """The flow run's state and its tasks' states, as the Prefect server has them."""
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    async def read():
        async with PrefectClient(api=stack.prefect_api) as client:
            flows = await client.read_flow_runs()
            flow = next(f for f in flows if f.parameters.get("run") == run)
            only = FlowRunFilter(id=FlowRunFilterId(any_=[flow.id]))
            tasks = await client.read_task_runs(flow_run_filter=only)
            return flow.state, {_stage(task.name): task.state.name for task in tasks}

    for _ in range(50):
        state, tasks = asyncio.run(read())
        if state.is_final():
            break
        time.sleep(0.2)
    return state.name, tasks


def mlflow_statuses(stack: Addresses, run: str) -> tuple[str, dict[str, str]]:
    """The parent run's status and its stages' statuses."""
    client = MlflowClient(stack.mlflow)
    experiment = client.get_experiment_by_name("finetune").experiment_id
    parent = client.search_runs([experiment], f"attributes.run_name = '{run}' and tags.role = 'run'")[0]
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    return parent.info.status, {c.info.run_name: c.info.status for c in children}


@pytest.fixture(scope="module")
def first_run(storage, stack):
    """One run from rows to report; the small test cannot pass the gates, and must say so."""
    code, output = finish(start(storage, stack, "first"))
    return code, output


def test_a_run_from_rows_to_report(first_run, storage, stack):
    code, output = first_run
    assert code == 3, output
    run = storage / "runs" / "first"
    assert (storage / "runs" / "latest").resolve() == run
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


def test_mlflow_has_curves_params_datasets_artifacts_and_the_model(first_run, storage, stack):
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
    assert {name for name in before if name.startswith("eval/")} == {n for n in after if n.startswith("eval/")}
    artifacts = {artifact.path for artifact in client.list_artifacts(training.info.run_id, "adapter")}
    assert "adapter/adapter_model.safetensors" in artifacts
    version = client.get_model_version_by_alias("function-calling-embedded", "candidate")
    assert version.run_id == training.info.run_id
    assert client.get_registered_model("function-calling-embedded").aliases.keys() == {"candidate"}


def test_answers_shuffled_between_requests_teach_nothing_and_the_rest_is_reused(first_run, storage, stack):
    code, output = finish(start(storage, stack, "shuffled", training__shuffle_answers="true"))
    assert code == 3, output
    assert output.count("reusing") == 2
    _, tasks = prefect_states(stack, "shuffled")
    assert tasks["prepare_dataset"] == "Cached"
    assert tasks["run_inference_baseline"] == "Cached"
    assert tasks["run_inference_finetuned"] == "Completed"
    comparison = read_json(storage / "runs" / "shuffled" / "report" / "comparison.json")
    assert not comparison["is_improvement"]
    assert comparison["statement"].startswith("No improvement")


def test_the_original_compared_with_itself_is_no_improvement(first_run, storage, stack):
    code, output = finish(
        start(storage, stack, "itself", inference__adapter="none", training__max_steps_per_epoch=2)
    )  # fmt: skip
    assert code == 3, output
    comparison = read_json(storage / "runs" / "itself" / "report" / "comparison.json")
    primary = comparison["groups"][0]["paired"]
    assert (primary["difference"], primary["p_value"]) == (0, 1)
    assert not comparison["is_improvement"]


def test_a_killed_rank_is_failed_everywhere_with_its_own_error_and_the_run_resumes(first_run, storage, stack):
    process = start(storage, stack, "killed")
    wait_for_line(storage / "runs" / "killed" / "jobs" / "train_adapter", "step 3/6")
    rank = next(
        process
        for process in processes_under(storage)
        if process.environ().get("RANK") == "1" and "tasks.pool.torchrun_agent" not in process.cmdline()
    )
    rank.kill()
    code, output = finish(process)
    assert code == 1
    assert "SIGKILL" in output
    state, tasks = prefect_states(stack, "killed")
    assert (state, tasks["train_adapter"]) == ("Failed", "Failed")
    status, children = mlflow_statuses(stack, "killed")
    assert (status, children["train_adapter"]) == ("FAILED", "FAILED")
    assert not processes_under(storage)

    code, output = finish(start(storage, stack, "killed"))
    assert code == 3, output
    assert "going on from checkpoint-2" in output


@pytest.mark.parametrize("stage", ["prepare_dataset", "train_adapter"])
def test_ctrl_c_ends_the_run_truthfully_and_leaves_nothing(first_run, storage, stack, stage):
    run = f"interrupted-{stage}"
    # Another seed, so that no stage is reused.
    process = start(storage, stack, run, dataset__seed=1 if stage == "prepare_dataset" else 7)
    attempts = storage / "runs" / run / "jobs" / stage
    deadline = time.monotonic() + 120
    while not list(attempts.glob("*/started.json")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    assert not processes_under(storage)
    state, _ = prefect_states(stack, run)
    assert state == "Cancelled"
    status, children = mlflow_statuses(stack, run)
    assert status == "KILLED"
    assert children[stage] == "KILLED"


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


def test_an_unknown_deployment_lists_those_there_are(storage, stack):
    done = subprocess.run(
        [sys.executable, "-m", "flows.finetune", "nothing"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "demo, poc, poc-reference" in done.stderr
