"""Finds the rank that stands still, and ends the attempt saying which one and since when.

A rank that hangs leaves all others waiting in a collective, whose own time limit names nobody. So every rank says where
it is: the thread that trains counts the places it passes, a second thread writes the count to the attempt's store every
few seconds, and rank 0 looks which count is the lowest and no longer grows. Rank 1 looks after rank 0.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from tasks.training.ranks import Ranks


class HungRank(RuntimeError):
    """A rank that stands still longer than it may."""


@dataclass
class Seen:
    """What is known of a rank: how many places it passed, which was the last, and when that changed."""

    count: int = -1
    place: str = "before training"
    monotonic: float = field(default_factory=time.monotonic)
    wall: float = field(default_factory=time.time)


def find_hung(seen: dict[int, Seen], *, now: float, limit_s: float) -> str | None:
    """Which ranks hang, in words; None while the slowest still moves.

    Args:
        now: as ``time.monotonic()``.
    """
    behind = min(rank.count for rank in seen.values())
    slowest = {number: rank for number, rank in seen.items() if rank.count == behind}
    since = max(rank.monotonic for rank in slowest.values())
    if now - since <= limit_s:
        return None
    last = max(slowest.values(), key=lambda rank: rank.monotonic)
    what = f"since {datetime.fromtimestamp(last.wall):%H:%M:%S} ({now - since:.0f} s): {last.place}"
    if len(slowest) == len(seen) > 1:
        return f"all {len(seen)} ranks stand still {what}. None is behind: the collective itself or the network hangs"
    names = ", ".join(map(str, sorted(slowest)[:16])) + (" and more" if len(slowest) > 16 else "")
    return f"rank {names} stands still {what}" if len(slowest) == 1 else f"ranks {names} stand still {what}"


class Watchdog:
    """The heartbeat of this rank, and on ranks 0 and 1 the eye on the others.

    Args:
        limit_s: longest time without passing a place.
    """

    def __init__(self, ranks: Ranks, limit_s: float, *, say: Callable[[str], None]) -> None:
        self._ranks, self._limit_s, self._say = ranks, limit_s, say
        self._interval_s = min(5.0, limit_s / 10)
        self._place = (0, "training begins")
        self._stopped = threading.Event()
        # A connection of its own: the one of the process groups may be the one that waits.
        self._store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to beat; all ranks must have come here."""
        self._thread.start()

    def at(self, place: str) -> None:
        """Pass a place. All ranks pass the same places in the same order."""
        self._place = (self._place[0] + 1, place)

    def stop(self) -> None:
        """Stop looking; a rank that has nothing left to do does not hang."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        rank, watched = self._ranks.rank, self._watched()
        # Rank 1 waits longer: where rank 0 lives, its message is the better one.
        limit_s = self._limit_s if rank == 0 else 1.2 * self._limit_s
        seen = {number: Seen() for number in watched}
        while not self._stopped.wait(self._interval_s):
            count, place = self._place
            try:
                self._store.set(_key(rank), f"{count}|{place}")
                for number in watched:
                    self._look(number, seen[number])
            except RuntimeError as error:
                # The store lives as long as rank 0's node; without it nothing can be said of anyone.
                self._say(f"the watchdog of rank {rank} has lost the attempt's store and stops: {error}")
                return
            if watched and (problem := find_hung(seen, now=time.monotonic(), limit_s=limit_s)):
                self._end_attempt(problem)

    def _watched(self) -> range:
        return {0: range(self._ranks.world_size), 1: range(1)}.get(self._ranks.rank, range(0))

    def _look(self, rank: int, seen: Seen) -> None:
        if not self._store.check([_key(rank)]):
            return
        count, _, place = self._store.get(_key(rank)).decode().partition("|")
        if int(count) != seen.count:
            seen.count, seen.place, seen.monotonic, seen.wall = int(count), place, time.monotonic(), time.time()

    def _end_attempt(self, problem: str) -> None:
        error = HungRank(
            f"{problem}. Longer than training.collective_timeout_minutes={self._limit_s / 60:g}: the attempt ends and "
            "goes on from its newest checkpoint when it is started again; look at that rank's node"
        )
        self._say(str(error))
        get_error_handler().record_exception(error)
        sys.stdout.flush()
        # The thread that trains waits inside a collective and hears no exception.
        os._exit(1)


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"
