"""``python -m flows.cluster_check`` as a process: what it prints, leaves, records, and when it gives way."""

import asyncio
import fcntl
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

from flows.local_stack import REPOSITORY
from tasks.cluster.port_errors import AFTER, BEFORE, WATCHED
from tasks.contracts.cluster_report import Report, Status
from tasks.contracts.files import read_json
from tests.faults.cluster import FAULTS, SMALL, check_once, problem_of
from tests.integration.finetune_process import flow_run_named
from tests.integration.planted import PLANTED, SECRETS, files_with
from tests.processes import processes_under

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    """Of its own: no model is needed here."""
    return tmp_path_factory.mktemp("checks")


@pytest.fixture(scope="module")
def check(checks, stack):
    def run(name: str, *settings: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "flows.cluster_check", "demo", "--run", name]
        for setting in [*SMALL, f"storage.shared={checks}", "cluster=tested", *settings]:
            command += ["--set", setting]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=os.environ | stack.environment() | PLANTED, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=400,
        )  # fmt: skip
        print(done.stdout)
        assert not processes_under(checks)
        for secret in SECRETS:
            assert secret not in done.stdout
            assert files_with(checks / "checks" / name, secret) == []
        return done.returncode, done.stdout

    return run


def report_of(storage: Path, name: str) -> Report:
    return Report.model_validate(read_json(storage / "checks" / name / "report" / "cluster-check.json"))


def runs(stack) -> dict:
    client = MlflowClient(stack.mlflow)
    experiment = client.get_experiment_by_name("cluster-check").experiment_id
    return {r.info.run_name: r for r in client.search_runs([experiment], "tags.role = 'run'")}


@pytest.fixture(scope="module")
def sound(check) -> tuple[int, str]:
    return check("sound", "stages=[inventory, collectives, storage]")


def test_a_sound_machine_passes_with_every_figure_and_every_form_of_the_report(sound, checks, stack):
    code, output = sound
    assert code == 0, output
    report = report_of(checks, "sound")
    assert report.status in (Status.PASS, Status.WARN), report.statement
    assert {f.stage for f in report.findings} == {
        "inventory",
        "devices",
        "collectives",
        "storage",
        "training",
        "endurance",
    }
    # There are no adapters here whose counters could be judged; they were looked for all the same.
    records = [read_json(path) for path in checks.glob("checks/sound/jobs/collectives/*/**/rank-*.json")]
    assert [record["facts"][AFTER] for record in records] == [[], []]
    assert all(record["facts"][BEFORE] == [] and record["facts"][WATCHED] > 0 for record in records)
    left_out = {f.gate: (f.status, f.detail) for f in report.findings if f.gate in ("ring", "rails")}
    assert set(left_out) == {"ring", "rails"}
    assert all(status is Status.SKIP and "pool.gpus is off" in why for status, why in left_out.values())
    folder = checks / "checks" / "sound" / "report"
    cases = ET.parse(folder / "cluster-check.junit.xml").findall(".//testcase")
    assert len(cases) == len(report.findings) > 40
    names = {path.name.partition(".")[2] for path in folder.iterdir()}
    assert names == {"html", "json", "junit.xml", "md", "prom"}
    recorded = runs(stack)["sound"]
    assert recorded.info.status == "FINISHED"
    assert recorded.data.tags["verdict"] == report.status.value
    assert "collectives/all_reduce_busbw_gbytes_per_s/1024/all" in recorded.data.metrics


def test_a_verdict_that_changes_is_an_event_and_a_fail_has_its_own_exit_status(sound, check, checks, stack):
    # Of other stages it says nothing of this one's verdict.
    code, output = check("before", "stages=[inventory]")
    assert code == 0, output
    assert "the verdict of tested changed" not in output
    # No two processes read a clock at the same nanosecond.
    code, output = check("changed", "stages=[inventory]", "thresholds.max_clock_skew_s=1e-9")
    assert code == 3, output
    assert "the verdict of tested changed from" in output
    assert "FAIL  inventory/clock_skew" in output
    assert "start chrony" in output
    assert runs(stack)["changed"].info.status == "FAILED"


def test_a_check_gives_way_when_the_pool_is_taken_and_says_so(check, checks, stack):
    with a_job_that_has_the_machine(checks):
        code, output = check("gave-way", "stages=[inventory, devices]", "pool.queue_limit_minutes=0.05")
    assert code == 4, output
    report = report_of(checks, "gave-way")
    assert report.status is Status.SKIP
    assert "the pool is taken by others" in output
    assert runs(stack)["gave-way"].data.tags["verdict"] == "SKIP"


def leave(name: str, checks: Path, stack) -> subprocess.Popen:
    """A check whose flow was killed in the middle of a job, which lives on."""
    command = [sys.executable, "-m", "flows.cluster_check", "demo", "--run", name]
    settings = [*SMALL, f"storage.shared={checks}", "stages=[inventory, devices]", "devices.warmup_s=300"]
    for setting in [*settings, "stall_limit_s=600"]:
        command += ["--set", setting]
    process = subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | stack.environment(), start_new_session=True)
    deadline = time.monotonic() + 120
    while not any(f"/checks/{name}/jobs/devices/" in " ".join(p.cmdline()) for p in processes_under(checks)):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.kill()
    process.wait()
    return process


def test_a_check_whose_flow_died_is_ended_by_reconcile_and_both_servers_say_so(checks, stack):
    left = leave("left", checks, stack)
    assert processes_under(checks), "a job outlives its flow"
    assert state_of(stack, "left")[0] == "Running"
    dry = reconcile(checks, stack, "--dry-run")
    assert f"left: cancel (left by process {left.pid}" in dry
    assert state_of(stack, "left")[0] == "Running"
    assert f"left: cancel (left by process {left.pid}" in reconcile(checks, stack)
    assert not processes_under(checks)
    name, message = state_of(stack, "left")
    assert name == "Crashed"
    assert "its process is gone" in message
    run = runs(stack)["left"]
    assert (run.info.status, "verdict" in run.data.tags) == ("KILLED", False)
    children = MlflowClient(stack.mlflow).search_runs(
        [run.info.experiment_id], f"tags.mlflow.parentRunId = '{run.info.run_id}'"
    )
    assert {child.info.run_name: child.info.status for child in children} == {
        "inventory": "FINISHED",
        "devices": "KILLED",
    }
    assert reconcile(checks, stack) == ""


def test_a_check_that_had_its_verdict_when_its_flow_died_ends_by_that(sound, checks, stack):
    leave("judged", checks, stack)
    # As if it had died between the verdict on the disk and its last word to both servers.
    shutil.copytree(checks / "checks" / "sound" / "report", checks / "checks" / "judged" / "report")
    reconcile(checks, stack)
    assert state_of(stack, "judged") == ("Completed", report_of(checks, "sound").statement)
    assert runs(stack)["judged"].info.status == "FINISHED"
    assert not processes_under(checks)


def reconcile(storage: Path, stack, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "flows.reconcile", "--storage", str(storage), *options],
        cwd=REPOSITORY, env=os.environ | stack.environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def state_of(stack, name: str) -> tuple[str, str]:
    state = asyncio.run(flow_run_named(stack, name)).state
    return state.name, state.message or ""


@contextmanager
def a_job_that_has_the_machine(storage: Path):
    (storage / "pool").mkdir(exist_ok=True)
    with (storage / "pool" / "local.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_gpus_that_are_not_there_are_refused_before_anything_is_started(check):
    code, output = check("no-gpus", "pool.gpus=true", "pool.processes_per_node=8")
    assert code == 2, output
    assert "2 nodes x 8 processes need 16 GPUs and this machine shows" in output


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_through_the_whole_flow_is_caught_and_the_first_suspect_is_who_did_it(
    kind, checks, stack, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stack.mlflow)
    monkeypatch.chdir(REPOSITORY)
    # Its log would go on to the server when that has ended.
    with temporary_settings({PREFECT_API_URL: stack.prefect_api, PREFECT_LOGGING_TO_API_ENABLED: False}):
        report, _ = check_once(checks, f"injected-{kind}", kind, node=1)
    assert problem_of(report, kind, node=1) == ""
    assert report.injected is not None
    assert not processes_under(checks)
