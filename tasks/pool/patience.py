"""How long a job may wait: for its turn, for its ranks to meet, and for a node in place of a lost one."""

import time
from collections.abc import Callable
from pathlib import Path

from tasks.contracts.attempt import BEGUN
from tasks.contracts.files import read_json
from tasks.contracts.job import FailureKind, JobError, JobFailed, JobHandle, JobSpec, JobState, Pool
from tasks.pool.torchrun_files import HOST

EXPLAIN_S = 2
"""Between two questions what a job waits for."""


class NoReplacement(JobFailed):
    """A node was lost, no other came in time, and the job may go on with fewer."""


class Patience:
    """Tells what a job waits for, and when it has waited too long.

    Args:
        on_waiting: told at every change of what it waits for.
        lost_a_node: the attempt before this one did.
    """

    def __init__(
        self,
        pool: Pool,
        job: JobSpec,
        handle: JobHandle,
        on_waiting: Callable[[str], None],
        *,
        lost_a_node: bool = False,
    ) -> None:
        self._pool, self._job, self._handle, self._on_waiting = pool, job, handle, on_waiting
        self._attempt = Path(handle)
        self._lost_a_node = lost_a_node
        now = time.monotonic()
        self._since, self._explained = now, float("-inf")
        self._state: JobState | None = None
        self._reason: str | None = None

    def check(self, state: JobState) -> None:
        """Look at the clock.

        Raises:
            JobFailed: it has waited longer than its limit.
            NoReplacement: it has, and there is a way to go on.
        """
        has_begun = state is JobState.RUNNING and (self._attempt / BEGUN).exists()
        now = time.monotonic()
        if state is not self._state or has_begun:
            # Slurm puts a job that lost a node back into the queue.
            self._lost_a_node |= state is JobState.QUEUED and self._state is JobState.RUNNING
            self._lost_a_node &= not has_begun
            self._state, self._since, self._reason = state, now, None
        waited_s = now - self._since
        if state is JobState.QUEUED:
            if now - self._explained >= EXPLAIN_S:
                self._explained = now
                self._explain()
            self._check_replacement(waited_s)
            limit = self._job.queue_limit_s
            if limit is not None and waited_s > limit:
                why = self._pool.explain(self._handle) or "no reason given"
                waited = f"still queued after {limit / 60:g} minutes ({why})"
                raise self._failed(state, f"{waited}; raise pool.queue_limit_minutes or ask for less", FailureKind.USER)
        elif state is JobState.RUNNING and not has_begun:
            self._check_replacement(waited_s)
            limit = self._job.start_limit_s
            if limit is not None and waited_s > limit:
                said = f"its ranks had not met {limit / 60:g} minutes after it began: {self._who_is_missing()}"
                raise self._failed(
                    state, f"{said}; raise pool.start_limit_minutes if nodes need longer", FailureKind.TRANSIENT
                )

    def _explain(self) -> None:
        reason = self._pool.explain(self._handle)
        if reason and reason != self._reason:
            self._reason = reason
            self._on_waiting(reason)

    def _check_replacement(self, waited_s: float) -> None:
        limit = self._job.replacement_limit_s
        if self._lost_a_node and self._job.fallback_num_nodes and limit is not None and waited_s > limit:
            said = f"a node was lost and no other came in {limit / 60:g} minutes"
            error = JobError(said, kind=FailureKind.LOST)
            raise NoReplacement(self._job.name, JobState.PREEMPTED, error)

    def _who_is_missing(self) -> str:
        missing = [n for n in range(self._job.num_nodes) if not (self._attempt / HOST.format(node=n)).exists()]
        if missing:
            return f"of {self._job.num_nodes} nodes, {_listed(missing)} never started its agent"
        hosts = [read_json(self._attempt / HOST.format(node=n))["host"] for n in range(self._job.num_nodes)]
        return f"every node's agent runs ({', '.join(hosts)}), but they cannot reach each other"

    def _failed(self, state: JobState, said: str, kind: FailureKind) -> JobFailed:
        return JobFailed(self._job.name, state, JobError(said, kind=kind))


def _listed(nodes: list[int]) -> str:
    return ", ".join(f"node {node}" for node in nodes)
