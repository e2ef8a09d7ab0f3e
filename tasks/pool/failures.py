"""Which rank failed first: the one whose error is the cause, not the ones that lost their peer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SIGTERM_EXIT_CODE = -15
PEER_LOSS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "socket timeout",
    "recvvalue failed",
    "remote process has terminated",
    "distnetworkerror",
)


@dataclass(frozen=True)
class RankFailure:
    """One rank's end."""

    node: int
    rank: int
    message: str
    traceback: str


def first_failure(failures_by_node: Mapping[int, Sequence[Mapping[str, Any]]]) -> RankFailure | None:
    """The root cause among what every node's torchrun recorded, or None if nothing was.

    torchrun stamps whole seconds, so time alone cannot tell a killed rank from the rank that then lost its peer.
    Ranks that torchrun itself ended (SIGTERM) come last, ranks that report a lost peer before them, then time decides.
    """

    def order(item: tuple[int, Mapping[str, Any]]) -> tuple[bool, bool, float, int]:
        _, failure = item
        text = f"{failure['message']} {failure['traceback']}".lower()
        was_ended = failure["exit_code"] == SIGTERM_EXIT_CODE
        lost_peer = failure["exit_code"] > 0 and any(sign in text for sign in PEER_LOSS)
        return was_ended, lost_peer, failure["time"], failure["rank"]

    items = [(node, failure) for node, failures in failures_by_node.items() for failure in failures]
    if not items:
        return None
    node, failure = min(items, key=order)
    return RankFailure(node, failure["rank"], failure["message"], failure["traceback"])
