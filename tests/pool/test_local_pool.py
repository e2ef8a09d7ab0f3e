"""The local pool with real torchrun agents: two emulated nodes of one process each."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tasks.contracts.job import JobFailed, JobSpec, JobState, LogLine
from tasks.pool.local import LocalPool
from tasks.pool.supervise import Interrupted, Watch, supervise
from tests.processes import processes_under

pytestmark = pytest.mark.integration


@pytest.fixture
def pool(tmp_path):
    return LocalPool(tmp_path / "pool")


def job(tmp_path: Path, name: str = "toy", time_limit_s: float = 120, **arguments) -> JobSpec:
    return JobSpec(
        name=name,
        module="tests.pool.toy_job",
        arguments=arguments,
        folder=str(tmp_path / "jobs" / name),
        num_nodes=2,
        min_num_nodes=2,
        time_limit_s=time_limit_s,
    )


def one_of(tmp_path: Path, module: str) -> psutil.Process:
    return next(process for process in processes_under(tmp_path) if module in process.cmdline())


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path):
    yield
    deadline = time.monotonic() + 5
    while (left := processes_under(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def wait_for(pool, handle, text: str, limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if any(text in log.read_text() for log in Path(handle).glob("node-*.log")):
            return
        time.sleep(0.1)
    pytest.fail(f"{text!r} never appeared; the job is {pool.state(handle)}: {pool.error(handle)}")


def test_two_nodes_meet_and_leave_a_result(pool, tmp_path):
    lines: list[LogLine] = []
    states: list[JobState] = []
    metrics = []
    watch = Watch(
        on_line=lines.append, on_state=states.append, on_metrics=lambda step, at, values: metrics.append((step, values))
    )
    result = supervise(pool, job(tmp_path), watch)
    assert result["sum"] == 3
    assert states[-1] is JobState.SUCCEEDED
    assert metrics == [(1, {"sum": 3.0})]
    assert {line.node for line in lines if "sees the sum 3" in line.text} == {0, 1}
    # The same name again is the same job: nothing runs a second time.
    assert supervise(pool, job(tmp_path), Watch()) == result
    assert [p.name for p in (tmp_path / "jobs" / "toy").iterdir() if p.name.isdigit()] == ["001"]


def test_the_failing_ranks_own_error_is_shown_and_not_its_peers(pool, tmp_path):
    with pytest.raises(JobFailed) as caught:
        supervise(pool, job(tmp_path, fail_rank=1), Watch())
    assert caught.value.error.rank == 1
    assert caught.value.error.node == 1
    assert "rank 1 has a bad value: 42" in caught.value.error.summary
    assert "raise ValueError" in caught.value.error.traceback


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


def test_cancel_is_complete_when_it_returns(pool, tmp_path):
    handle = pool.submit(job(tmp_path, hang=True))
    wait_for(pool, handle, "rank 0 sees the sum")
    assert len(processes_under(tmp_path)) >= 5
    pool.cancel(handle)
    assert not processes_under(tmp_path)
    assert pool.state(handle) is JobState.CANCELLED


def test_a_request_to_stop_cancels_the_job(pool, tmp_path):
    stop = threading.Event()
    threading.Timer(4, stop.set).start()
    with pytest.raises(Interrupted):
        supervise(pool, job(tmp_path, hang=True), Watch(should_stop=stop.is_set))


def test_another_process_adopts_the_running_job(pool, tmp_path):
    handle = pool.submit(job(tmp_path, hang=True))
    other = LocalPool(tmp_path / "pool")
    assert other.submit(job(tmp_path, hang=True)) == handle
    other.cancel(handle)
    # A cancelled attempt is not adopted: the next one is new.
    again = other.submit(job(tmp_path, hang=True))
    assert again != handle
    other.cancel(again)


def test_fifty_submits_of_one_name_are_one_job(pool, tmp_path):
    with ThreadPoolExecutor(50) as executor:
        handles = set(executor.map(lambda _: pool.submit(job(tmp_path, hang=True)), range(50)))
    assert len(handles) == 1
    pool.cancel(handles.pop())


def test_jobs_take_turns_at_the_machine(pool, tmp_path):
    first = pool.submit(job(tmp_path, name="first", hang=True))
    wait_for(pool, first, "sees the sum")
    second = pool.submit(job(tmp_path, name="second", hang=True))
    assert pool.state(second) is JobState.QUEUED
    # A job that waits can be cancelled as well.
    pool.cancel(second)
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
