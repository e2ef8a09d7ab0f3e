"""``python -m flows.finetune`` on a small scale as a process, and what Prefect and MLflow say of its runs."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort

from flows.local_stack import REPOSITORY, Addresses

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


def start(
    storage: Path, stack: Addresses, run: str, *, deployment: str = "demo", secrets: Mapping[str, str] = {}, **settings
) -> subprocess.Popen:
    values = SMALL | {"storage.shared": storage} | {k.replace("__", "."): v for k, v in settings.items()}
    command = [sys.executable, "-m", "flows.finetune", deployment, "--run", run]
    for name, value in values.items():
        command += ["--set", f"{name}={value}"]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=os.environ | stack.environment() | {"HF_HUB_OFFLINE": "1"} | secrets,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_signals,
    )


def _heed_signals() -> None:
    # A shell starts background commands with SIGINT ignored, nohup with SIGHUP, and children inherit that.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=900)
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


async def flow_run_named(stack: Addresses, run: str) -> FlowRun:
    """The newest flow run of that name, as the Prefect server has it."""
    async with PrefectClient(api=stack.prefect_api) as client:
        flow_runs = await client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_DESC)
        return next(f for f in flow_runs if f.parameters.get("run") == run)


def prefect_state(stack: Addresses, run: str) -> str:
    """The flow run's state at this moment."""
    return asyncio.run(flow_run_named(stack, run)).state.name


def prefect_states(stack: Addresses, run: str) -> tuple[str, dict[str, str]]:
    """The flow run's state and its tasks' states, as the Prefect server has them."""

    async def read():
        flow_run = await flow_run_named(stack, run)
        async with PrefectClient(api=stack.prefect_api) as client:
            only = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
            tasks = await client.read_task_runs(flow_run_filter=only)
            return flow_run.state, {_stage(task.name): task.state.name for task in tasks}

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


def wait_for_child(stack: Addresses, run: str, stage: str, limit_s: float = 120) -> None:
    """Until MLflow shows the stage of the newest run of that name as running."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            if mlflow_statuses(stack, run)[1].get(stage) == "RUNNING":
                return
        except IndexError:
            pass
        time.sleep(0.05)
    pytest.fail(f"{stage} of {run} never ran")
