"""Whose turn it is on this machine: one job on its processors, one job on each of its GPUs."""

import fcntl
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

LOOK_S = 0.2


@contextmanager
def turn_at_processors(folder: Path) -> Iterator[None]:
    """Wait for, and hold, the processors; jobs with the same folder take turns.

    The kernel gives it back when the process ends, however it ends.
    """
    with (folder / "local.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def turn_at_gpus(folder: Path, gpus: Sequence[str], wanted: int) -> Iterator[list[str]]:
    """Wait for, and hold, ``wanted`` of the GPUs with these UUIDs, the first that are free.

    A GPU is held by a name in the kernel's abstract socket namespace: it is the whole machine's, whatever folder or user
    a job has, needs no file that others may write, and is free when its process has ended. Who came first gathers first,
    so that a wide job is not passed by narrow ones for ever.

    Raises:
        ValueError: there are fewer than that.
    """
    if wanted > len(gpus):
        raise ValueError(f"{wanted} GPUs are wanted and there are {len(gpus)}")
    with ExitStack() as held:
        with (folder / "gpus.lock").open("w") as gathering:
            fcntl.flock(gathering, fcntl.LOCK_EX)
            mine: list[str] = []
            while len(mine) < wanted:
                for gpu in gpus:
                    if len(mine) < wanted and gpu not in mine and (name := _take(gpu)) is not None:
                        held.enter_context(name)
                        mine.append(gpu)
                if len(mine) < wanted:
                    time.sleep(LOOK_S)
        yield sorted(mine, key=list(gpus).index)


def _take(gpu: str) -> socket.socket | None:
    name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        name.bind(f"\0proving-ground/gpu/{gpu}")
    except OSError:
        name.close()
        return None
    return name
