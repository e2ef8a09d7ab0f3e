"""Work in threads that no process waits for at its end: one that fails meanwhile, or is told to go, is to end at once.

The threads of :mod:`concurrent.futures` are waited for; those of ``multiprocessing.pool.ThreadPool`` are not, but take semaphores
of the system.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


def begin(work: Callable[..., Made], *arguments: Any) -> Future[Made]:
    """Begin ``work(*arguments)`` in a thread of its own; what it returns or raises is the future's."""
    begun: Future[Made] = Future()
    Thread(target=_do, args=(begun, work, *arguments), daemon=True).start()
    return begun


def in_order(work: Callable[[Given], Made], items: Iterable[Given], *, most_at_once: int) -> Iterator[Made]:
    """``map(work, items)``, several at once; the first in their order that fails raises its own error."""
    waiting: SimpleQueue[tuple[Future[Made], Given]] = SimpleQueue()
    begun: list[Future[Made]] = []
    for item in items:
        begun.append(Future())
        waiting.put((begun[-1], item))

    def do_all() -> None:
        while True:
            try:
                future, item = waiting.get_nowait()
            except Empty:
                return
            _do(future, work, item)

    for _ in range(min(most_at_once, len(begun))):
        Thread(target=do_all, daemon=True).start()
    return (future.result() for future in begun)


def _do(begun: Future[Made], work: Callable[..., Made], *arguments: Any) -> None:
    try:
        made = work(*arguments)
    except BaseException as error:
        # It is raised where the result is asked for.
        begun.set_exception(error)
    else:
        begun.set_result(made)
