"""What every pool must do, whatever its scheduler: tests that each pool's own file takes over by subclassing."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tasks.contracts.job import JobFailed, JobSpec, JobState, LogLine
from tasks.pool.retry import Retries, run_to_end
from tasks.pool.supervise import Interrupted, Watch, supervise
from tests.conftest import REPOSITORY


def job(tmp_path: Path, name: str = "toy", **arguments) -> JobSpec:
    """A small job of two nodes; what the spec knows goes there, the rest to the program."""
    of_the_job = (
        "time_limit_s",
        "num_nodes",
        "queue_limit_s",
        "start_limit_s",
        "replacement_limit_s",
        "fallback_num_nodes",
    )
    settings = {key: arguments.pop(key) for key in of_the_job if key in arguments}
    return JobSpec(
        name=name,
        module="tests.pool.toy_job",
        arguments=arguments,
        folder=str(tmp_path / "jobs" / name),
        env={"PYTHONPATH": str(REPOSITORY)},
        **{"num_nodes": 2, "time_limit_s": 300} | settings,
    )


def attempts(tmp_path: Path, name: str = "toy") -> list[str]:
    return sorted(path.name for path in (tmp_path / "jobs" / name).iterdir() if path.name.isdigit())


def wait_for(pool, handle, text: str, limit_s: float = 90) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if any(text in log.read_text() for log in Path(handle).glob("node-*.log")):
            return
        time.sleep(0.1)
    logs = {path.name: path.read_text()[-2000:] for path in Path(handle).glob("*.log")}
    pytest.fail(f"{text!r} never appeared; the job is {pool.state(handle)}: {pool.error(handle)}; logs: {logs}")


@dataclass
class Outcome:
    """What became of a job that was run to its end in a thread."""

    result: dict | None = None
    error: JobFailed | None = None
    whys: list[str] = field(default_factory=list)


@contextlib.contextmanager
def running_to_its_end(pool, spec: JobSpec, max_retries: int = 2):
    """The job under the supervision that flows have, without the pauses; the outcome is whole after the block."""
    outcome = Outcome()

    def run() -> None:
        try:
            outcome.result = run_to_end(
                pool,
                spec,
                Retries(max_retries),
                attempt=lambda: contextlib.nullcontext(Watch()),
                on_again=lambda failed, again: outcome.whys.append(again.why),
                on_away=lambda away: None,
                pause=lambda seconds: None,
            )
        except JobFailed as error:
            outcome.error = error

    thread = threading.Thread(target=run)
    thread.start()
    yield outcome
    thread.join(300)
    assert not thread.is_alive()


class AnyPool:
    def test_two_nodes_meet_and_leave_a_result(self, pool, tmp_path):
        lines: list[LogLine] = []
        states: list[JobState] = []
        metrics = []
        watch = Watch(
            on_line=lines.append,
            on_state=states.append,
            on_metrics=lambda step, at, values: metrics.append((step, values)),
        )
        result = supervise(pool, job(tmp_path), watch)
        assert result["sum"] == 3
        assert states[-1] is JobState.SUCCEEDED
        assert metrics == [(1, {"sum": 3.0})]
        assert {line.node for line in lines if "sees the sum 3" in line.text} == {0, 1}
        # The same name again is the same job: nothing runs a second time.
        assert supervise(pool, job(tmp_path), Watch()) == result
        assert attempts(tmp_path) == ["001"]

    def test_the_failing_ranks_own_error_is_shown_and_not_its_peers(self, pool, tmp_path):
        with pytest.raises(JobFailed) as caught:
            supervise(pool, job(tmp_path, fail_rank=1), Watch())
        error = caught.value.error
        assert error.rank == 1, error
        # Which node a rank is on is what the rendezvous made of it; the node that is named must be the rank's own.
        assert "rank 1 sees the sum" in (tmp_path / "jobs" / "toy" / "001" / f"node-{error.node}.log").read_text()
        assert "rank 1 has a bad value: 42" in error.summary
        assert "raise ValueError" in error.traceback

    def test_a_request_to_stop_cancels_the_job(self, pool, tmp_path):
        stop = threading.Event()
        threading.Timer(4, stop.set).start()
        with pytest.raises(Interrupted):
            supervise(pool, job(tmp_path, hang=True), Watch(should_stop=stop.is_set))

    def test_a_running_job_is_adopted_and_a_cancelled_one_is_not(self, pool, tmp_path):
        handle = pool.submit(job(tmp_path, hang=True))
        assert pool.submit(job(tmp_path, hang=True)) == handle
        wait_for(pool, handle, "rank 0 sees the sum")
        pool.cancel(handle)
        assert pool.state(handle) is JobState.CANCELLED
        again = pool.submit(job(tmp_path, hang=True))
        assert again != handle
        pool.cancel(again)

    def test_fifty_submits_of_one_name_are_one_job(self, pool, tmp_path):
        with ThreadPoolExecutor(50) as executor:
            handles = set(executor.map(lambda _: pool.submit(job(tmp_path, hang=True)), range(50)))
        assert len(handles) == 1
        assert attempts(tmp_path) == ["001"]
        pool.cancel(handles.pop())
