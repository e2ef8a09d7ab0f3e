"""What goes wrong on a cluster, done to a real run: killed processes, Ctrl-C, a full disk, rows that are none."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.finetune import cancel_jobs, finetune
from flows.local_stack import REPOSITORY, Addresses
from tests.integration.finetune_process import (
    STAGES,
    finish,
    flow_run_named,
    mlflow_statuses,
    prefect_state,
    prefect_states,
    wait_for_child,
    wait_for_line,
)
from tests.integration.planted import PLANTED, SECRETS, files_with
from tests.processes import processes_under

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

# Training that still runs when another process has started.
LONG = {"training__num_epochs": 12}
# Settings with which a stage has work of its own to do, whatever was cached before.
FRESH = {
    "prepare_dataset": {"dataset__seed": 1},
    "run_inference_finetuned": {"inference__adapter": "none", "training__max_steps_per_epoch": 2},
}


def rank_of(storage: Path, run: str, stage: str, rank: str, limit_s: float = 180) -> psutil.Process:
    """A rank of the stage's job, as soon as it lives."""
    job = str(storage / "runs" / run / "jobs" / stage)
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        for process in processes_under(storage):
            try:
                is_agent = "tasks.pool.torchrun_agent" in process.cmdline()
                if not is_agent and job in " ".join(process.cmdline()) and process.environ().get("RANK") == rank:
                    return process
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.1)
    pytest.fail(f"rank {rank} of {job} never lived")


def test_a_killed_rank_is_failed_everywhere_with_its_own_error_and_the_run_resumes(
    first_run, start_small, storage, stack
):
    process = start_small("killed", pool__num_nodes=2, pool__max_retries=0, secrets=PLANTED)
    wait_for_line(storage / "runs" / "killed" / "jobs" / "train_adapter", "step 3/6")
    rank_of(storage, "killed", "train_adapter", "1").kill()
    assert_failed_with_its_rank(process, storage, stack, "killed", "train_adapter", 1)
    # Errors and tracebacks may show more than a run that ends well.
    for secret in SECRETS:
        assert files_with(storage / "runs" / "killed", secret) == []
        assert files_with(storage / "servers", secret) == []

    code, output = finish(start_small("killed", pool__num_nodes=2))
    assert code == 3, output
    assert re.search("going on from step-00000[24]", output)


def test_a_stage_that_fails_first_fails_the_run_and_the_others_say_that_they_were_stopped(
    first_run, start_small, storage, stack
):
    run = "first-fails"
    # Three jobs that need nothing of each other: one has the machine, two wait for it.
    settings = {"inference__adapter": "none", "inference__max_new_tokens": 47, "pool__max_retries": 0}
    process = start_small(run, **settings)
    rank = rank_of(storage, run, "", "0")
    stage = re.search(r"/jobs/(\w+)/", " ".join(rank.cmdline()))[1]
    rank.kill()
    assert_failed_with_its_rank(process, storage, stack, run, stage, 0)
    _, children = mlflow_statuses(stack, run)
    assert sorted(children.values()) == ["FAILED", "FINISHED", "KILLED", "KILLED"]


def assert_failed_with_its_rank(
    process: subprocess.Popen, storage: Path, stack: Addresses, run: str, stage: str, rank: int
) -> None:
    code, output = finish(process)
    assert code == 1, output
    assert f"rank {rank}" in output
    assert "SIGKILL" in output
    assert not any(secret in output for secret in SECRETS)
    state, tasks = prefect_states(stack, run)
    assert (state, tasks[stage]) == ("Failed", "Failed")
    status, children = mlflow_statuses(stack, run)
    assert (status, children[stage]) == ("FAILED", "FAILED")
    assert not processes_under(storage)


@pytest.mark.parametrize("stage", ["prepare_dataset", "run_inference_finetuned"])
def test_ctrl_c_ends_the_run_truthfully_and_leaves_nothing(first_run, start_small, storage, stack, stage):
    run = f"interrupted-{stage}"
    process = start_small(run, **FRESH[stage])
    rank_of(storage, run, stage, "0")
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    assert not processes_under(storage)
    state, _ = prefect_states(stack, run)
    assert state == "Cancelled"
    status, children = mlflow_statuses(stack, run)
    assert status == "KILLED"
    assert children[stage] == "KILLED"


def test_ctrl_c_in_the_comparison_keeps_every_answer(first_run, start_small, storage, stack):
    run = "interrupted-compare"
    # A run of which everything but the comparison is finished: the first one's, as if its jobs had been told this one's folders.
    folder = shutil.copytree(storage / "runs" / "first", storage / "runs" / run, symlinks=True)
    shutil.rmtree(folder / "report")
    for told in [*folder.glob("jobs/*/*/spec.json"), *folder.glob("jobs/*/*/result.json")]:
        told.write_text(told.read_text().replace("/runs/first/", f"/runs/{run}/"))
    process = start_small(run, pool__num_nodes=2)
    wait_for_child(stack, run, "compare_models")
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    assert prefect_states(stack, run)[0] == "Cancelled"
    status, children = mlflow_statuses(stack, run)
    assert (status, children["compare_models"]) == ("KILLED", "KILLED")
    assert {children[stage] for stage in STAGES - {"compare_models"}} == {"FINISHED"}

    code, output = finish(start_small(run, pool__num_nodes=2))
    assert code == 3, output
    assert (storage / "runs" / run / "report" / "comparison.html").exists()


@pytest.mark.parametrize(("number", "said"), [(signal.SIGTERM, "Crashed"), (signal.SIGHUP, "Cancelled")])
def test_a_run_told_to_end_or_left_by_its_terminal_stops_its_jobs(first_run, start_small, storage, stack, number, said):
    run = f"ended-by-{number.name.lower()}"
    process = start_small(run, training__max_steps_per_epoch=2, inference__adapter="none")
    rank_of(storage, run, "train_adapter", "0")
    process.send_signal(number)
    code, output = finish(process)
    assert code == 130, output
    assert not processes_under(storage)
    assert prefect_states(stack, run)[0] == said
    assert mlflow_statuses(stack, run)[0] == "KILLED"


def test_a_dead_flows_job_lives_on_and_reconcile_ends_it_and_makes_both_statuses_true(
    first_run, start_small, storage, stack
):
    run = "orphaned"
    process = start_small(run, **LONG)
    rank_of(storage, run, "train_adapter", "0")
    process.kill()
    finish(process)
    assert processes_under(storage), "the job must outlive its flow: a restarted flow adopts it"
    assert prefect_state(stack, run) == "Running"
    reconciled = subprocess.run(
        [sys.executable, "-m", "flows.reconcile", "--storage", str(storage)],
        cwd=REPOSITORY,
        env=os.environ | stack.environment(),
        capture_output=True,
        text=True,
    )
    assert reconciled.returncode == 0, reconciled.stderr
    # Nothing can start a run again that has no deployment.
    assert f"{run}: cancel (left by process {process.pid}" in reconciled.stdout
    assert not processes_under(storage)
    assert prefect_state(stack, run) == "Crashed"
    status, children = mlflow_statuses(stack, run)
    assert (status, children["train_adapter"]) == ("KILLED", "KILLED")


def test_a_run_is_driven_by_one_flow_at_a_time(first_run, start_small, storage, stack):
    run = "driven"
    process = start_small(run, **LONG)
    rank_of(storage, run, "train_adapter", "0")
    code, output = finish(start_small(run, **LONG))
    assert code == 1, output
    assert f"is driven by another process (process {process.pid} on" in output
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    assert mlflow_statuses(stack, run)[0] == "KILLED"


def test_the_jobs_of_a_cancelled_flow_are_ended_by_its_hook(first_run, start_small, storage, stack):
    process = start_small("hooked", **LONG)
    rank_of(storage, "hooked", "train_adapter", "0")
    process.kill()
    finish(process)
    flow_run = asyncio.run(flow_run_named(stack, "hooked"))
    cancel_jobs(finetune, flow_run, flow_run.state)
    assert not processes_under(storage)


def test_a_dataset_without_a_usable_row_says_so(first_run, start_small, storage, stack, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"conversations": [{"from": "human", "value": "no answer follows"}], "tools": "[]"}\n' * 40)
    run = "unusable"
    code, output = finish(start_small(run, dataset__sources=rows))
    assert code == 1, output
    assert str(rows) in output
    state, tasks = prefect_states(stack, run)
    assert (state, tasks["prepare_dataset"]) == ("Failed", "Failed")
    assert mlflow_statuses(stack, run)[1]["prepare_dataset"] == "FAILED"


def test_a_model_that_the_hub_does_not_have_says_so(first_run, start_small, storage, stack):
    code, output = finish(start_small("no-model", model__name="nobody/no-such-model"))
    assert code == 1, output
    assert "nobody/no-such-model" in output
    assert "local folder" in output


def test_a_disk_that_fills_up_costs_checkpoints_and_not_the_run(first_run, start_small, storage, stack, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=66m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        (disk / "models").symlink_to(storage / "models")
        settings = {"storage__shared": disk, "storage__min_free_gbytes": 0.01, "training__lora__rank": 72}
        # A checkpoint is 36 MB with its optimiser: the first fits, the two after it do not.
        code, output = finish(start_small("full", **settings))
        assert code == 3, output
        assert "CHECKPOINT NOT WRITTEN at step 4: [Errno 28] No space left on device" in output
        assert "some checkpoints could not be written" in output
        status, children = mlflow_statuses(stack, "full")
        # The gates are what the parent failed by.
        assert (status, children["train_adapter"]) == ("FAILED", "FINISHED")
        checkpoints = disk / "runs" / "full" / "training" / "checkpoints"
        assert sorted(path.name for path in checkpoints.iterdir()) == ["LATEST", "step-000002"]
        assert not processes_under(disk)
    finally:
        subprocess.run(["umount", disk], check=True)
