"""Brings a job to its end through what happens to clusters: one attempt after another, until one ends well or none can."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tasks.contracts.attempt import BEGUN
from tasks.contracts.job import FailureKind, JobFailed, JobSpec, Pool
from tasks.pool.attempts import newest_attempt
from tasks.pool.patience import NoReplacement
from tasks.pool.supervise import Watch, supervise

FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 300.0


@dataclass(frozen=True)
class Again:
    """Another attempt.

    Attributes:
        job: what it runs; with fewer nodes where one was lost and not replaced.
        pause_s: how long to wait first.
        why: for people.
    """

    job: JobSpec
    pause_s: float
    why: str
    lost_a_node: bool = False


class Retries:
    """Decides after a failed attempt whether another one is worth it.

    What was preempted, told to leave, or lost a node goes on from its checkpoint, however often, as long as its ranks had
    met since the time before. Where a network, a device or a process gave way, or ranks never met, ``max_retries`` further
    attempts follow, each after twice the pause. Errors of the program would only come again.
    """

    def __init__(self, max_retries: int) -> None:
        self._max_retries = max_retries
        self._num_counted = 0

    def after(self, failed: JobFailed, job: JobSpec, *, has_begun: bool) -> Again | None:
        """What follows the failure of an attempt whose ranks had met or not (``has_begun``); None if nothing."""
        kind, summary = failed.error.kind, failed.error.summary
        if isinstance(failed, NoReplacement):
            fewer, *rest = job.fallback_num_nodes
            narrower = replace(job, num_nodes=fewer, fallback_num_nodes=tuple(rest))
            return Again(narrower, 0.0, f"{summary}: going on with {fewer} of {job.num_nodes} nodes", lost_a_node=True)
        if kind is FailureKind.USER:
            return None
        if kind is FailureKind.LOST and has_begun:
            return Again(job, FIRST_PAUSE_S, f"{summary}: going on from the newest checkpoint", lost_a_node=True)
        if self._num_counted >= self._max_retries:
            return None
        pause_s = min(FIRST_PAUSE_S * 2**self._num_counted, LONGEST_PAUSE_S)
        self._num_counted += 1
        why = f"{summary}: attempt {self._num_counted} of {self._max_retries} more (pool.max_retries) in {pause_s:g} s"
        return Again(job, pause_s, why, lost_a_node=kind is FailureKind.LOST)


def run_to_end(
    pool: Pool,
    job: JobSpec,
    retries: Retries,
    *,
    attempt: Callable[[], AbstractContextManager[Watch]],
    on_again: Callable[[JobFailed, Again], None],
    pause: Callable[[float], None],
) -> dict[str, Any]:
    """Run ``job`` until an attempt ends well, and return its result.

    Args:
        attempt: entered for each attempt; leaves with its outcome.
        on_again: told before another attempt.
        pause: waits; raises Interrupted if the run is asked to stop meanwhile.

    Raises:
        JobFailed, Interrupted, ValueError, PoolError: as :func:`supervise`, of the last attempt.
    """
    lost_a_node = False
    while True:
        try:
            with attempt() as watch:
                return supervise(pool, job, watch, lost_a_node=lost_a_node)
        except JobFailed as failed:
            newest = newest_attempt(Path(job.folder))
            has_begun = newest is not None and (newest / BEGUN).exists()
            again = retries.after(failed, job, has_begun=has_begun)
            if again is None:
                raise
            on_again(failed, again)
        pause(again.pause_s)
        job, lost_a_node = again.job, again.lost_a_node
