"""What a job is and what became of it; the same on every scheduler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NewType, Protocol

JobHandle = NewType("JobHandle", str)
"""A plain string, kept on disk, so that another process can take over."""


class JobState(Enum):
    """Where a job stands. What a backend does not understand is UNKNOWN, which is never success."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    PREEMPTED = "preempted"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"

    @property
    def is_final(self) -> bool:
        """Whether the job will never run again."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.PREEMPTED, JobState.CANCELLED)


STARTS = "starts"
"""File of an attempt: when each of its lives began, in unix seconds a line; Slurm may requeue a job in place."""
LEFT_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: a rank was told to leave, has saved, and wants to go on from there in another attempt."""


class FailureKind(Enum):
    """What a failure calls for."""

    LOST = "lost"
    """Preempted, told to leave, or a node is gone: another attempt resumes, however often."""
    TRANSIENT = "transient"
    """A network, a device or a process gave way: another attempt is worth it a few times."""
    USER = "user"
    """The program, its settings or its data: another attempt would fail as well."""


@dataclass(frozen=True)
class JobSpec:
    """What runs, independent of where.

    Attributes:
        name: unique in the pool, deterministic: the same name twice is the same job.
        module: Python module that every rank runs as ``python -m module spec.json``.
        arguments: JSON-serialisable; what the module is told.
        folder: on shared storage; holds one sub-folder per attempt.
        log_folder: where the nodes' logs go; None: into the attempt's folder.
        num_nodes, processes_per_node: width.
        fallback_num_nodes: with how many nodes instead it may go on, most first, once one was lost and no other came in
            time; not every number divides a batch.
        gpus: one GPU per process.
        env: added to the environment of every rank; never a secret.
        time_limit_s: longest run.
        queue_limit_s: longest wait for its turn; None: as long as it takes.
        start_limit_s: longest time from its turn until all ranks have met; None: as long as it takes.
        replacement_limit_s: longest wait for another node after one was lost, where it may go on with fewer.
    """

    name: str
    module: str
    arguments: Mapping[str, Any]
    folder: str
    num_nodes: int = 1
    fallback_num_nodes: tuple[int, ...] = ()
    processes_per_node: int = 1
    gpus: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    time_limit_s: float = 4 * 3600
    queue_limit_s: float | None = None
    start_limit_s: float | None = None
    replacement_limit_s: float | None = None
    log_folder: str | None = None


@dataclass(frozen=True)
class LogLine:
    """One line of one node's output."""

    node: int
    text: str


@dataclass(frozen=True)
class JobError:
    """Why a job failed: the first failing rank's own error, and the last lines of every node."""

    summary: str
    rank: int | None = None
    node: int | None = None
    traceback: str = ""
    last_lines: tuple[LogLine, ...] = ()
    kind: FailureKind = FailureKind.USER


class Pool(Protocol):
    """The GPU pool: submit, look, read, stop."""

    def submit(self, job: JobSpec) -> JobHandle:
        """Start the job, or adopt the attempt of this name that is queued, running or finished well."""

    def state(self, job: JobHandle) -> JobState:
        """Where it stands."""

    def explain(self, job: JobHandle) -> str | None:
        """Why it waits, in the scheduler's own words; None if it does not or says nothing."""

    def logs(self, job: JobHandle) -> Iterator[LogLine | None]:
        """Every node's lines, live, from the first one; None while there is nothing new; ends after the last."""

    def error(self, job: JobHandle) -> JobError | None:
        """Why it failed; None if it did not."""

    def cancel(self, job: JobHandle) -> None:
        """Stop it; when this returns no process of it is left."""


class PoolError(RuntimeError):
    """The scheduler refuses, or cannot be asked; quotes it."""


class SchedulerAway(PoolError):
    """The scheduler could not be asked at all; it comes back, and nothing was decided."""


class MayStillRun(PoolError):
    """The job had to end, and the scheduler did not say that it has ended it: nothing else may begin in its place."""


class JobFailed(RuntimeError):
    """An attempt at a job that ended without success."""

    def __init__(self, name: str, state: JobState, error: JobError) -> None:
        self.name, self.state, self.error = name, state, error
        lines = [f"job {name} {state.value}: {error.summary}"]
        if error.traceback:
            lines.append(error.traceback.rstrip())
        elif error.last_lines:
            lines += [f"[node {line.node}] {line.text}" for line in error.last_lines]
        super().__init__("\n".join(lines))
