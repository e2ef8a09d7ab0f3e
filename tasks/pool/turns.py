"""Whose turn it is on this machine: one job on its processors, one job on each of its GPUs."""

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tasks.contracts.files import only_one

LOOK_S = 0.2


@contextmanager
def turn_at_processors(folder: Path, on_wait: Callable[[], object]) -> Iterator[None]:
    """Wait for, and hold, the processors; jobs with the same folder take turns.

    Args:
        on_wait: called once if another job has them.
    """
    with only_one(folder / "local.lock", on_wait):
        yield


@contextmanager
def turn_at_gpus(gpus: Sequence[str], wanted: int, on_wait: Callable[[], object]) -> Iterator[list[str]]:
    """Wait for, and hold, ``wanted`` of the GPUs with these UUIDs, the first that are free.

    A GPU is held by a name in the kernel's abstract socket namespace: it is the whole machine's (of one network namespace:
    containers have their own), whatever folder or user a job has, needs no file that others may write, and is free when
    its process has ended. One job at a time gathers, so that no two wait for each other's half and a wide job is not
    passed by narrow ones for ever.

    Args:
        on_wait: called once if other jobs have too many of them, and still have them at a second look.

    Raises:
        ValueError: there are fewer than that.
    """
    if wanted > len(gpus):
        raise ValueError(f"{wanted} GPUs are wanted and there are {len(gpus)}")
    looks = 0

    def wait() -> None:
        nonlocal looks
        looks += 1
        # At the first look another job may have been gathering and no more.
        if looks == 2:
            on_wait()
        time.sleep(LOOK_S)

    with ExitStack() as held:
        mine: list[str] = []
        while (gathering := _take("gathering")) is None:
            wait()
        with gathering:
            while len(mine) < wanted:
                for gpu in gpus:
                    if len(mine) < wanted and gpu not in mine and (name := _take(gpu)) is not None:
                        held.enter_context(name)
                        mine.append(gpu)
                if len(mine) < wanted:
                    wait()
        yield sorted(mine, key=list(gpus).index)


def _take(what: str) -> socket.socket | None:
    name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        name.bind(f"\0proving-ground/gpu/{what}")
    except OSError:
        name.close()
        return None
    return name
