"""Workers: what one does to the others, and how it is told."""

import os
import signal

import pytest

from tasks.dataset.workers import WorkerLost, ordered_map


class Squarer:
    """Squares numbers; at -1 its process ends as the system ends one that takes too much memory."""

    def __call__(self, number: int) -> int:
        if number < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return number * number


def test_results_come_in_order():
    assert list(ordered_map(Squarer, (), range(50), 2)) == [n * n for n in range(50)]


def test_a_worker_that_is_ended_from_outside_is_named_with_what_to_do():
    with pytest.raises(WorkerLost, match=r"one of 2 workers was ended from outside.*lower dataset\.num_workers"):
        list(ordered_map(Squarer, (), [1, 2, 3, -1, 4], 2))
