"""A function over many items in several processes: results in order, few items in flight, nothing to set up for little."""

import gc
import itertools
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerLost(RuntimeError):
    """A worker has ended without an answer."""


IN_FLIGHT_PER_WORKER = 3
ITEMS_WITHOUT_WORKERS = 2
"""Starting processes takes longer than this many items do."""

_function: Callable[[Any], Any] | None = None
"""This worker's function, made once."""


def ordered_map(
    make: Callable[..., Callable[[Item], Result]], arguments: tuple[Any, ...], items: Iterable[Item], num_workers: int
) -> Iterator[Result]:
    """``make(*arguments)`` applied to every item, in the items' order.

    ``make`` runs once per process. At most a few items per worker are read ahead, so that memory does not grow with them.

    Raises:
        WorkerLost: a worker was ended from outside.
    """
    iterator = iter(items)
    first = list(itertools.islice(iterator, ITEMS_WITHOUT_WORKERS + 1))
    if num_workers == 1 or len(first) <= ITEMS_WITHOUT_WORKERS:
        yield from map(make(*arguments), itertools.chain(first, iterator))
        return
    # Spawned, not forked: the parent has threads of libraries that do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, _prepare, (make, arguments)) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in itertools.chain(first, iterator):
                waiting.append(pool.submit(_apply, item))
                if len(waiting) >= IN_FLIGHT_PER_WORKER * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise WorkerLost(
                f"one of {num_workers} workers was ended from outside, most often for want of memory; lower dataset.num_workers "
                "(each takes about 0.3 GB), or give more memory"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _prepare(make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    global _function
    # Looking for cycles among the rows that are being worked on takes a tenth of the time and finds none. What is counted is
    # objects made less objects gone, so that only cycles that pile up get this far, never an item's own rows.
    gc.freeze()
    gc.set_threshold(300_000, 20, 50)
    _function = make(*arguments)


def _apply(item: Any) -> Any:
    assert _function is not None
    return _function(item)
