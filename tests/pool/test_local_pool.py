"""The local pool with real torchrun agents: two emulated nodes of one process each."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tasks.contracts.files import read_json
from tasks.contracts.job import JobFailed, JobSpec, JobState
from tasks.pool.attempts import WAITS
from tasks.pool.local import LocalPool
from tasks.pool.supervise import Watch, supervise
from tests.conftest import REPOSITORY
from tests.pool.any_pool import AnyPool, attempts, job, running_to_its_end, wait_for
from tests.processes import processes_under

pytestmark = pytest.mark.integration


@pytest.fixture
def pool(tmp_path):
    return LocalPool(tmp_path / "pool")


def one_of(tmp_path: Path, module: str) -> psutil.Process:
    return next(process for process in processes_under(tmp_path) if module in process.cmdline())


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path):
    yield
    deadline = time.monotonic() + 5
    while (left := processes_under(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def test_a_killed_rank_is_named_with_its_signal(pool, tmp_path):
    handle = pool.submit(job(tmp_path, hang=True))
    wait_for(pool, handle, "rank 1 sees the sum")
    ranks = [
        process
        for process in processes_under(tmp_path)
        if process.environ().get("RANK") == "1" and "tasks.pool.torchrun_agent" not in process.cmdline()
    ]
    assert len(ranks) == 1
    ranks[0].send_signal(signal.SIGKILL)
    with pytest.raises(JobFailed, match="SIGKILL"):
        supervise(pool, job(tmp_path, hang=True), Watch())


def test_a_killed_agent_leaves_no_rank_behind(pool, tmp_path):
    handle = pool.submit(job(tmp_path, hang=True))
    wait_for(pool, handle, "rank 1 sees the sum")
    one_of(tmp_path, "tasks.pool.torchrun_agent").kill()
    with pytest.raises(JobFailed, match="SIGKILL"):
        supervise(pool, job(tmp_path, hang=True), Watch())


def agents(tmp_path: Path) -> list[psutil.Process]:
    return [process for process in processes_under(tmp_path) if "tasks.pool.torchrun_agent" in process.cmdline()]


def test_a_lost_node_goes_on_in_a_new_attempt_that_counts_for_nothing(pool, tmp_path):
    handle = pool.submit(job(tmp_path, hang=2))
    wait_for(pool, handle, "rank 1 sees the sum")
    with running_to_its_end(pool, job(tmp_path, hang=2), max_retries=0) as outcome:
        agents(tmp_path)[0].kill()
    assert outcome.result["sum"] == 3
    assert attempts(tmp_path) == ["001", "002"]
    assert "was lost: its torchrun agent was killed by SIGKILL" in outcome.whys[0]
    summary = read_json(Path(handle) / "summary.json")
    assert (summary["state"], len(summary["hosts"])) == ("preempted", 2)


def test_ranks_that_are_told_to_leave_save_and_go_on_in_a_new_attempt(pool, tmp_path):
    spec = job(tmp_path, hang=2, leaves=True)
    handle = pool.submit(spec)
    wait_for(pool, handle, "rank 1 sees the sum")
    with running_to_its_end(pool, spec, max_retries=0) as outcome:
        for agent, number in zip(agents(tmp_path), (signal.SIGUSR1, signal.SIGTERM), strict=True):
            agent.send_signal(number)
    assert outcome.result["sum"] == 3
    assert attempts(tmp_path) == ["001", "002"]
    assert outcome.whys[0].startswith("the ranks were told to leave, and left")


def test_a_killed_rank_is_tried_again_and_an_error_of_the_program_is_not(pool, tmp_path):
    handle = pool.submit(job(tmp_path, hang=2))
    wait_for(pool, handle, "rank 1 sees the sum")
    rank = next(process for process in processes_under(tmp_path) if process.environ().get("RANK") == "1")
    with running_to_its_end(pool, job(tmp_path, hang=2), max_retries=1) as outcome:
        rank.kill()
    assert outcome.result["sum"] == 3
    with running_to_its_end(pool, job(tmp_path, name="wrong", fail_rank=1), max_retries=5) as outcome:
        pass
    assert "rank 1 has a bad value: 42" in outcome.error.error.summary
    assert attempts(tmp_path, "wrong") == ["001"]


def test_a_node_that_never_comes_is_named_when_the_start_takes_too_long(pool, tmp_path):
    spec = job(tmp_path, start_limit_s=8)
    handle = pool.submit(spec)
    deadline = time.monotonic() + 30
    while len(agents(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    late = next(agent for agent in agents(tmp_path) if agent.environ()["NODE_RANK"] == "1")
    late.suspend()
    with running_to_its_end(pool, spec, max_retries=0) as outcome:
        pass
    assert pool.state(handle) is JobState.CANCELLED
    assert "of 2 nodes, node 1 never started its agent; raise pool.start_limit_minutes" in outcome.error.error.summary


def test_cancel_is_complete_when_it_returns(pool, tmp_path):
    handle = pool.submit(job(tmp_path, hang=True))
    wait_for(pool, handle, "rank 0 sees the sum")
    assert len(processes_under(tmp_path)) >= 5
    pool.cancel(handle)
    assert not processes_under(tmp_path)
    assert pool.state(handle) is JobState.CANCELLED


def test_another_process_adopts_the_running_job(pool, tmp_path):
    handle = pool.submit(job(tmp_path, hang=True))
    other = LocalPool(tmp_path / "pool")
    assert other.submit(job(tmp_path, hang=True)) == handle
    other.cancel(handle)


def test_a_flow_killed_hard_leaves_a_job_that_another_adopts(pool, tmp_path):
    script = (
        "from pathlib import Path; from tests.pool.any_pool import *; from tasks.pool.local import LocalPool;"
        f"supervise(LocalPool(Path({str(tmp_path / 'pool')!r})), job(Path({str(tmp_path)!r}), pause_s=6), Watch())"
    )
    flow = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY)
    attempt = tmp_path / "jobs" / "toy" / "001"
    wait_for(pool, str(attempt), "rank 0 sees the sum")
    flow.kill()
    flow.wait()
    assert supervise(pool, job(tmp_path, pause_s=6), Watch())["sum"] == 3
    assert attempts(tmp_path) == ["001"]


def test_jobs_take_turns_at_the_machine(pool, tmp_path):
    first = pool.submit(job(tmp_path, name="first", hang=True))
    wait_for(pool, first, "sees the sum")
    second = pool.submit(job(tmp_path, name="second", hang=True))
    assert pool.state(second) is JobState.QUEUED
    deadline = time.monotonic() + 60
    while (reason := pool.explain(second)) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert reason == "another job has this machine"
    # Until it has looked it waits for nobody.
    (Path(second) / WAITS).unlink()
    assert pool.state(second) is JobState.QUEUED
    assert pool.explain(second) is None
    # A job that waits can be cancelled as well.
    pool.cancel(second)
    assert pool.explain(second) is None
    assert pool.state(second) is JobState.CANCELLED
    pool.cancel(first)


def test_a_job_beyond_its_time_limit_is_ended_and_says_so(pool, tmp_path):
    with pytest.raises(JobFailed, match=r"longer than its limit of 5 s.*time_limit_minutes"):
        supervise(pool, job(tmp_path, hang=True, time_limit_s=5), Watch())


def test_a_runner_killed_hard_is_a_failure_and_not_success(pool, tmp_path):
    handle = pool.submit(job(tmp_path, hang=True))
    wait_for(pool, handle, "sees the sum")
    runner = one_of(tmp_path, "tasks.pool.local_runner")
    runner.send_signal(signal.SIGKILL)
    runner.wait(5)
    assert pool.state(handle) is JobState.FAILED
    assert "vanished" in pool.error(handle).summary
    pool.cancel(handle)


def test_more_gpus_than_the_machine_has_are_refused(pool, tmp_path):
    wide = JobSpec("wide", "m", {}, str(tmp_path / "wide"), num_nodes=64, processes_per_node=64, gpus=True)
    with pytest.raises(ValueError, match=r"need 4096 GPUs.*pool.gpus=false"):
        pool.submit(wide)
    assert not (tmp_path / "wide").exists()


class TestLocalPool(AnyPool):
    """What every pool must do."""
