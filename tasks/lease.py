"""Who drives a run: a file that its flow keeps renewing, so that a dead flow is told from a slow one.

Prefect shows a run whose process was killed as running, for ever. A lease is on the shared folder, like everything by which
a run is taken over: it tells the other processes, on other machines too, whether somebody is at work.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.contracts.files import only_one, read_json, write_json
from tasks.contracts.job import PoolError
from tasks.pool.process_identity import identity_of

RENEW_S = 10.0
STALE_AFTER_S = 120.0
"""Longer than shared storage lags (attribute caches keep up to 60 s) and a busy process misses its turn."""


class DrivenElsewhere(ValueError):
    """Another living process drives the run."""


@dataclass(frozen=True)
class Lease:
    """The newest word of a run's driver.

    Attributes:
        process: which process of its host's boot the pid meant.
        age_s: since it was renewed, by the clock of the storage.
    """

    flow_run_id: str
    host: str
    pid: int
    process: str
    age_s: float

    @property
    def identity(self) -> dict[str, Any]:
        """What is written in the file, by which it is told from another's."""
        names = ("flow_run_id", "host", "pid", "process")
        return {name: getattr(self, name) for name in names}

    @property
    def is_alive(self) -> bool:
        """Whether somebody is at work; on this machine the process itself is looked at, elsewhere the clock."""
        if self.host == socket.gethostname():
            return identity_of(self.pid) == self.process
        return self.age_s < STALE_AFTER_S

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, heard of {self.age_s:.0f} s ago"


def read_lease(path: Path) -> Lease | None:
    """The lease in a file, or None if the run was given back."""
    try:
        values: dict[str, Any] = read_json(path)
        written = path.stat().st_mtime
    except FileNotFoundError:
        return None
    return Lease(**values, age_s=_storage_now(path.parent) - written)


@contextmanager
def lease(path: Path, flow_run_id: str, on_lost: Callable[[], None]) -> Iterator[None]:
    """Drive a run while the block lasts.

    A scheduler that could not be asked leaves the lease behind: what it may still run is for ``reconcile`` to end.

    Args:
        on_lost: called when another has taken the run over, as from a process that stood still for minutes.

    Raises:
        DrivenElsewhere: somebody else does.
    """
    mine = {
        "flow_run_id": flow_run_id,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process": identity_of(os.getpid()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    _take(path, mine)
    done = threading.Event()
    thread = threading.Thread(target=_renew, args=(path, mine, done, on_lost), name="lease", daemon=True)
    thread.start()
    is_left = False
    try:
        yield
    except PoolError:
        is_left = True
        raise
    finally:
        done.set()
        thread.join()
        if not is_left:
            with _one_at_a_time(path):
                give_back(path, mine)


def give_back(path: Path, whose: Mapping[str, Any]) -> None:
    """Remove the lease if it is still this one."""
    if _is_of(path, whose):
        path.unlink(missing_ok=True)


def _one_at_a_time(path: Path) -> AbstractContextManager[None]:
    """Around looking and writing: of two that find a run free at the same moment one gets it."""
    return only_one(path.with_name(f".{path.name}.lock"))


def _is_of(path: Path, whose: Mapping[str, Any]) -> bool:
    found = read_lease(path)
    return found is not None and all(getattr(found, name) == value for name, value in whose.items())


def _take(path: Path, mine: dict[str, Any]) -> None:
    """Write the lease, once that of a process that may be dead, on another machine, has run out."""
    first: Lease | None = None
    while True:
        # The lock is left between two looks: a living driver needs it to renew.
        with _one_at_a_time(path):
            other = read_lease(path)
            if other is None or not other.is_alive or (other.host, other.pid) == (mine["host"], mine["pid"]):
                write_json(path, mine)
                return
        if other.host == mine["host"] or (first is not None and other.age_s < first.age_s):
            raise DrivenElsewhere(
                f"{path.parent} is driven by another process ({other}); wait for it, end it, or start under another --run"
            )
        first = first or other
        time.sleep(1)


def _renew(path: Path, mine: dict[str, Any], done: threading.Event, on_lost: Callable[[], None]) -> None:
    while not done.wait(RENEW_S):
        # A full or absent disk stops the work itself, which says so; the lease only grows old.
        with suppress(OSError), _one_at_a_time(path):
            if not _is_of(path, mine):
                on_lost()
                return
            write_json(path, mine)


def _storage_now(folder: Path) -> float:
    """The time by the clock that stamps the storage's files, which need not be this machine's."""
    probe = folder / f".clock.{socket.gethostname()}.{os.getpid()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        probe.unlink(missing_ok=True)
