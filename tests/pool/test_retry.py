"""What is tried again, how often, and with how many nodes; with real folders and a scheduler of the test's own."""

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest

from tasks.contracts.attempt import BEGUN
from tasks.contracts.files import write_json
from tasks.contracts.job import (
    FailureKind,
    JobError,
    JobFailed,
    JobHandle,
    JobSpec,
    JobState,
    LogLine,
    SchedulerAway,
)
from tasks.pool import patience
from tasks.pool.attempts import begin_attempt, newest_attempt
from tasks.pool.patience import NoReplacement, Patience
from tasks.pool.retry import FIRST_PAUSE_S, Retries, run_to_end
from tasks.pool.supervise import Interrupted, Watch, supervise

WIDE = JobSpec("toy", "m", {}, "/nowhere", num_nodes=4, fallback_num_nodes=(2, 1), replacement_limit_s=0.0)


def failed(kind: FailureKind, summary: str = "rank 3 died") -> JobFailed:
    return JobFailed("toy", JobState.FAILED, JobError(summary, kind=kind))


def test_an_error_of_the_program_is_not_tried_again():
    assert Retries(5).after(failed(FailureKind.USER), WIDE, done=1) is None


def test_what_gave_way_is_tried_again_a_few_times_and_ever_later():
    retries = Retries(2)
    pauses = [
        again and again.pause_s
        for again in (retries.after(failed(FailureKind.TRANSIENT), WIDE, done=1) for _ in range(3))
    ]
    assert pauses == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, None]


def test_a_job_may_be_preempted_as_often_as_it_likes():
    retries = Retries(0)
    for step in range(1, 51):
        again = retries.after(failed(FailureKind.LOST), WIDE, done=step)
        assert again is not None
        assert again.lost_a_node


def test_a_job_that_is_lost_again_and_again_at_the_same_place_is_not_started_for_ever():
    retries = Retries(2)
    tries = [retries.after(failed(FailureKind.LOST), WIDE, done=7) for _ in range(4)]
    assert [again is not None for again in tries] == [True, True, True, False]


def test_a_job_that_is_lost_before_its_ranks_have_met_is_not_started_for_ever():
    retries = Retries(2)
    tries = [retries.after(failed(FailureKind.LOST), WIDE, done=0) for _ in range(3)]
    assert [again is not None for again in tries] == [True, True, False]


def test_without_a_replacement_it_goes_on_with_the_next_number_of_nodes_that_fits():
    retries = Retries(0)
    lost = NoReplacement("toy", JobState.PREEMPTED, JobError("a node was lost", kind=FailureKind.LOST))
    again = retries.after(lost, WIDE, done=0)
    assert (again.job.num_nodes, again.job.fallback_num_nodes) == (2, (1,))
    assert "2 of 4 nodes" in again.why


class Scripted:
    """A scheduler that ends each attempt as it is told; attempts are real folders."""

    def __init__(self, *ends: tuple[JobState, FailureKind | None]) -> None:
        self.ends, self.widths = list(ends), []
        self._states: dict[str, tuple[JobState, FailureKind | None]] = {}

    def submit(self, job: JobSpec) -> JobHandle:
        folder = Path(job.folder)
        folder.mkdir(parents=True, exist_ok=True)
        attempt = begin_attempt(job, newest_attempt(folder), "local")
        write_json(attempt / BEGUN, {})
        write_json(attempt / "progress.json", {"done": int(attempt.name), "total": 9, "unit": "steps"})
        write_json(attempt / "result.json", {"attempt": attempt.name})
        self._states[str(attempt)] = self.ends.pop(0)
        self.widths.append(job.num_nodes)
        return JobHandle(str(attempt))

    def state(self, handle):
        return self._states[handle][0]

    def explain(self, handle):
        return "no nodes"

    def logs(self, handle):
        yield LogLine(0, "hello")
        yield None

    def error(self, handle):
        kind = self._states[handle][1]
        return kind and JobError("it ended", kind=kind)

    def cancel(self, handle):
        self._states[handle] = (JobState.CANCELLED, None)


def run(pool: Scripted, job: JobSpec, max_retries: int = 1, pause=lambda seconds: None) -> tuple[dict, list[str]]:
    whys: list[str] = []
    result = run_to_end(
        pool,
        job,
        Retries(max_retries),
        attempt=lambda: contextlib.nullcontext(Watch()),
        on_again=lambda failed, again: whys.append(again.why),
        on_away=lambda away: whys.append(str(away)),
        pause=pause,
    )
    return result, whys


@pytest.fixture
def wide(tmp_path):
    return dataclasses.replace(WIDE, folder=str(tmp_path / "toy"))


def test_a_preempted_job_goes_on_in_a_new_attempt_and_ends_well(wide):
    lost, won = (JobState.PREEMPTED, FailureKind.LOST), (JobState.SUCCEEDED, None)
    result, whys = run(Scripted(lost, lost, lost, won), wide, max_retries=0)
    assert result == {"attempt": "004"}
    assert len(whys) == 3


def test_the_last_attempts_error_is_raised_when_tries_run_out(wide):
    gave_way = (JobState.FAILED, FailureKind.TRANSIENT)
    with pytest.raises(JobFailed, match="it ended"):
        run(Scripted(gave_way, gave_way, gave_way), wide, max_retries=2)


def test_a_queue_without_a_replacement_makes_the_job_narrower(wide):
    pool = Scripted(
        (JobState.PREEMPTED, FailureKind.LOST),
        (JobState.QUEUED, None),
        (JobState.QUEUED, None),
        (JobState.SUCCEEDED, None),
    )
    result, whys = run(pool, dataclasses.replace(wide, replacement_limit_s=-1.0))
    assert pool.widths == [4, 4, 2, 1]
    assert result == {"attempt": "004"}
    assert "1 of 2 nodes" in whys[-1]


class AwayAtFirst(Scripted):
    """Its controller cannot be asked the first two times."""

    num_away = 2

    def submit(self, job):
        if self.num_away:
            self.num_away -= 1
            raise SchedulerAway("Unable to contact slurm controller")
        return super().submit(job)


def test_a_scheduler_that_is_away_is_waited_for_and_nothing_is_counted(wide):
    result, whys = run(AwayAtFirst((JobState.SUCCEEDED, None)), wide, max_retries=0)
    assert result == {"attempt": "001"}
    assert whys == ["Unable to contact slurm controller"] * 2


def test_a_moment_without_an_answer_starts_no_clock_anew(wide, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(patience.time, "monotonic", lambda: now[0])
    pool = Scripted((JobState.QUEUED, None))
    watch = Patience(pool, dataclasses.replace(wide, queue_limit_s=60), pool.submit(wide), lambda reason: None)
    for state in (JobState.QUEUED, JobState.UNKNOWN) * 5:
        watch.check(state)
        now[0] += 6
    now[0] += 10
    with pytest.raises(JobFailed, match="still queued after 1 minutes"):
        watch.check(JobState.QUEUED)


def test_a_lost_node_is_remembered_while_the_scheduler_is_away(wide):
    pool = Scripted((JobState.QUEUED, None))
    handle = pool.submit(wide)
    (Path(handle) / BEGUN).unlink()
    watch = Patience(pool, dataclasses.replace(wide, replacement_limit_s=-1.0), handle, lambda reason: None)
    for state in (JobState.RUNNING, JobState.UNKNOWN):
        watch.check(state)
    with pytest.raises(NoReplacement):
        watch.check(JobState.QUEUED)


def test_a_server_that_is_away_is_told_later_and_the_job_ends_well(wide, tmp_path):
    pool = Scripted((JobState.SUCCEEDED, None))
    handle = pool.submit(wide)
    points = [json.dumps({"step": step, "time": 0.0, "metrics": {"loss": 1.0}}) + "\n" for step in (1, 2)]
    (Path(handle) / "metrics.jsonl").write_text("".join(points))
    pool.submit = lambda job: handle
    told, untold = [], []

    def record(step, at, metrics):
        if not untold:
            raise ConnectionError("MLflow is away")
        told.append(step)

    watch = Watch(on_metrics=record, on_untold=lambda error: untold.append(str(error)))
    assert supervise(pool, wide, watch) == {"attempt": "001"}
    assert untold == ["MLflow is away"]
    assert told == [1, 2]


def test_a_request_to_stop_ends_the_pause_between_attempts(wide):
    def stopped(seconds: float) -> None:
        raise Interrupted("stop")

    with pytest.raises(Interrupted):
        run(Scripted((JobState.FAILED, FailureKind.TRANSIENT)), wide, pause=stopped)


def test_nodes_that_never_came_are_named(wide):
    pool = Scripted((JobState.RUNNING, None))
    handle = pool.submit(wide)
    (Path(handle) / BEGUN).unlink()
    for node in (0, 2, 3):
        write_json(Path(handle) / f"node-{node}.host", {"host": f"gpu-{node}"})
    patience = Patience(pool, dataclasses.replace(wide, start_limit_s=-1.0), handle, lambda reason: None)
    with pytest.raises(JobFailed, match="of 4 nodes, node 1 never started its agent") as caught:
        patience.check(JobState.RUNNING)
    assert caught.value.error.kind is FailureKind.TRANSIENT
    write_json(Path(handle) / "node-1.host", {"host": "gpu-1"})
    with pytest.raises(JobFailed, match=r"gpu-0, gpu-1, gpu-2, gpu-3.*cannot reach each other"):
        patience.check(JobState.RUNNING)


def test_ranks_that_have_met_are_never_late(wide):
    pool = Scripted((JobState.RUNNING, None))
    handle = pool.submit(wide)
    Patience(pool, dataclasses.replace(wide, start_limit_s=-1.0), handle, lambda reason: None).check(JobState.RUNNING)
