"""Which rank failed first (whose error is the cause, not the ones that lost their peer), and what that calls for."""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.contracts.job import LEFT_EXIT_CODE, FailureKind

PEER_LOSS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "socket timeout",
    "recvvalue failed",
    "remote process has terminated",
    "remote process exited",
    "distnetworkerror",
)
GAVE_WAY = (
    *PEER_LOSS,
    "connection refused",
    "rendezvoustimeouterror",
    "rendezvousconnectionerror",
    "rendezvousclosederror",
    "distbackenderror",
    "nccl error",
    "nccl communicator was aborted",
    "watchdog caught collective operation timeout",
    "temporary failure in name resolution",
    "address already in use",
    "stale file handle",
    "transport endpoint is not connected",
    "uncorrectable ecc error",
    # Exceptions of ours that say so themselves, in tasks/training and tasks/contracts/attempt.py.
    "tryagain:",
    "hungrank:",
    "missingranks:",
    "checkpointnotseen:",
)
"""In the error of a rank: a network, a device or the storage gave way, and the program is not to blame."""
DEATHS = tuple(-number for number in (signal.SIGKILL, signal.SIGABRT, signal.SIGBUS, signal.SIGSEGV, signal.SIGTERM))
"""Exit codes of ranks that somebody else ended: the system for want of memory, NCCL's watchdog, a person."""


@dataclass(frozen=True)
class RankFailure:
    """One rank's end."""

    node: int
    rank: int
    message: str
    traceback: str
    kind: FailureKind


def first_failure(failures_by_node: Mapping[int, Sequence[Mapping[str, Any]]]) -> RankFailure | None:
    """The root cause among what every node's torchrun recorded, or None if nothing was.

    torchrun stamps whole seconds, so time alone cannot tell a killed rank from the rank that then lost its peer.
    Ranks that torchrun itself ended (SIGTERM) come last, ranks that report a lost peer before them, then time decides.
    """

    def order(item: tuple[int, Mapping[str, Any]]) -> tuple[bool, bool, float, int]:
        _, failure = item
        was_ended = failure["exit_code"] == -signal.SIGTERM
        lost_peer = failure["exit_code"] > 0 and _says(failure, PEER_LOSS)
        return was_ended, lost_peer, failure["time"], failure["rank"]

    items = [(node, failure) for node, failures in failures_by_node.items() for failure in failures]
    if not items:
        return None
    node, failure = min(items, key=order)
    return RankFailure(node, failure["rank"], failure["message"], failure["traceback"], _kind(failure))


def blamed_ranks(failures_by_node: Mapping[int, Sequence[Mapping[str, Any]]], world_size: int) -> list[int]:
    """The ranks to blame for a job's end, as far as what torchrun recorded tells.

    Those that died of themselves, by an error of their own or a signal; where all that failed only lost a peer or waited
    for one in vain, those that said nothing: they hung, or their node is gone.
    """
    failed = [failure for failures in failures_by_node.values() for failure in failures]
    ended_itself = [failure for failure in failed if failure["exit_code"] != -signal.SIGTERM]
    # SIGABRT is how NCCL's watchdog ends a rank that waits in vain.
    own = {
        failure["rank"]
        for failure in ended_itself
        if failure["exit_code"] != -signal.SIGABRT and not _says(failure, (*PEER_LOSS, "timed out", "missingranks:"))
    }
    if own:
        return sorted(own)
    # One that torchrun ended may have written before that it waited in vain, too.
    waited = {failure["rank"] for failure in failed if failure in ended_itself or _says(failure, ("missingranks:",))}
    return sorted(set(range(world_size)) - waited) if waited else []


def _kind(failure: Mapping[str, Any]) -> FailureKind:
    if failure["exit_code"] == LEFT_EXIT_CODE:
        return FailureKind.LOST
    if failure["exit_code"] in DEATHS or _says(failure, GAVE_WAY):
        return FailureKind.TRANSIENT
    return FailureKind.USER


def _says(failure: Mapping[str, Any], signs: Sequence[str]) -> bool:
    text = f"{failure['message']} {failure['traceback']}".lower()
    return any(sign in text for sign in signs)
