"""Brings one attempt at a job to its end on any backend: submit or adopt, follow, and either a result or the reason."""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tasks.contracts.attempt import Progress, read_progress, read_result
from tasks.contracts.job import (
    FailureKind,
    JobError,
    JobFailed,
    JobHandle,
    JobSpec,
    JobState,
    LogLine,
    MayStillRun,
    Pool,
    PoolError,
)
from tasks.pool.line_rate import LineRate
from tasks.pool.patience import Patience
from tasks.pool.reports import Reports
from tasks.pool.summary import Summary

UNKNOWN_POLL_S = 2.0
FULL_DISK_BYTES = 16 << 20
"""With less free than this a failed job is taken to have failed for it."""


class Interrupted(BaseException):
    """The run was asked to stop. Not an Exception: nothing may take it for a stage's failure and retry."""


@dataclass(frozen=True)
class Watch:
    """What to do with a job's signs of life; every part may be left out.

    Attributes:
        on_submit: once, with the handle.
        on_state: at every change.
        on_waiting: at every change of what a queued job waits for.
        on_line: every line of every node.
        on_progress: at every change.
        on_metrics: ``(step, unix time in s, metrics)`` for every point the job logs.
        on_untold: once, when ``on_progress`` or ``on_metrics`` begin to fail: they are tried again later, and the job goes on.
        should_stop: asked several times a second; True cancels the job.
    """

    on_submit: Callable[[JobHandle], None] = lambda handle: None
    on_state: Callable[[JobState], None] = lambda state: None
    on_waiting: Callable[[str], None] = lambda reason: None
    on_line: Callable[[LogLine], None] = lambda line: None
    on_progress: Callable[[Progress], None] = lambda progress: None
    on_metrics: Callable[[int, float, Mapping[str, float]], None] = lambda step, time, metrics: None
    on_untold: Callable[[Exception], None] = lambda error: None
    should_stop: Callable[[], bool] = lambda: False


def supervise(pool: Pool, job: JobSpec, watch: Watch, *, lost_a_node: bool = False) -> dict[str, Any]:
    """Bring one attempt at ``job`` to its end and return its result.

    Args:
        lost_a_node: the attempt before this one did; with too few nodes left it may go on with fewer.

    Raises:
        JobFailed: with the first failing rank's own error.
        Interrupted: ``watch.should_stop`` said so; the job is gone.
        ValueError: the pool cannot run such a job.
        PoolError: the scheduler refuses it, or does not say that it has ended it.
    """
    handle = pool.submit(job)
    # Backends keep the attempt's folder in the handle's last part; a local handle is that folder.
    attempt = Path(handle)
    watch.on_submit(handle)
    state: JobState | None = None
    progress: Progress | None = None
    metrics = _MetricsReader(attempt / "metrics.jsonl")
    patience = Patience(pool, job, handle, watch.on_waiting, lost_a_node=lost_a_node)
    lines = LineRate(watch.on_line)
    summary = Summary(job, attempt)
    reports = Reports(watch.on_untold)
    try:
        for line in pool.logs(handle):
            if line is not None:
                lines.take(line)
                continue
            lines.tick()
            if watch.should_stop():
                raise Interrupted(f"job {job.name} stopped on request")
            if (now := pool.state(handle)) is not state:
                state = now
                summary.saw(state)
                watch.on_state(state)
            patience.check(state)
            reported = read_progress(attempt)
            if reported not in (None, progress) and reports.tell(partial(watch.on_progress, reported)):
                progress = reported
            reports.tell(partial(metrics.forward, watch))
    except BaseException as cause:
        lines.finish()
        _end(pool, job, handle, cause)
        summary.write(pool.state(handle), str(cause))
        raise
    lines.finish()
    reports.tell(partial(metrics.forward, watch), even_if_out=True)
    while (state := pool.state(handle)) is JobState.UNKNOWN:
        # It has ended; the scheduler went away before it could be asked how.
        if watch.should_stop():
            raise Interrupted(f"job {job.name} stopped on request")
        time.sleep(UNKNOWN_POLL_S)
    watch.on_state(state)
    if state is JobState.SUCCEEDED:
        summary.write(state, None)
        return read_result(attempt)
    error = _with_full_disk(pool.error(handle) or JobError(f"ended in state {state.value}"), attempt)
    failed = JobFailed(job.name, state, error)
    summary.write(state, error.summary)
    # A rank may have outlived its agent: a failed job leaves no process behind.
    try:
        pool.cancel(handle)
    except PoolError as untold:
        failed.add_note(f"whether a process of it is left could not be asked: {untold}")
    raise failed


def _end(pool: Pool, job: JobSpec, handle: JobHandle, cause: BaseException) -> None:
    """Cancel the job; if that fails, what may still run is said before why it had to end."""
    try:
        pool.cancel(handle)
    except PoolError as error:
        said = f"job {job.name} may still run ({handle}): {error}\nIt had to end for this: {cause}"
        raise MayStillRun(said) from cause


def _with_full_disk(error: JobError, attempt: Path) -> JobError:
    """The error with its likely cause put first where the job's disk is full.

    What writes on a full disk fails with errors that name no disk (torch.save: ``unexpected pos``), and a runner that
    cannot leave its outcome looks as if it had vanished.
    """
    free = shutil.disk_usage(attempt).free
    if free >= FULL_DISK_BYTES:
        return error
    cause = f"No space left on device: {free / 1e6:.1f} MB are free at {attempt}; free some and start the run again"
    return replace(error, summary=f"{cause} ({error.summary})", kind=FailureKind.USER)


class _MetricsReader:
    """Follows ``metrics.jsonl``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def forward(self, watch: Watch) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            data = file.read()
        for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
            point = json.loads(line)
            watch.on_metrics(point["step"], point["time"], point["metrics"])
            # One at a time: what could not be told is told the next time.
            self._position += len(line)
