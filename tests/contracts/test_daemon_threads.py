"""Work in threads: what it makes or raises is there for whoever asks, and nobody waits for it who does not."""

import threading

import pytest

from tasks.contracts.daemon_threads import begin, in_order


def test_what_is_made_or_raised_is_the_futures():
    assert begin(divmod, 7, 2).result(10) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        begin(divmod, 7, 0).result(10)


def test_an_end_of_the_process_inside_is_handed_on_and_hangs_nobody():
    def leave():
        raise SystemExit(75)

    with pytest.raises(SystemExit):
        begin(leave).result(10)


@pytest.mark.parametrize("num_items", [0, 1, 50])
def test_results_come_in_the_order_of_the_items(num_items):
    assert list(in_order(lambda item: item * item, range(num_items), most_at_once=4)) == [
        n * n for n in range(num_items)
    ]


def test_as_many_are_at_work_as_may_be_and_no_more():
    together, now, most, lock = threading.Barrier(3), 0, 0, threading.Lock()

    def work(item):
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
        together.wait(10)
        with lock:
            now -= 1
        return item

    assert list(in_order(work, range(6), most_at_once=3)) == list(range(6))
    assert most == 3


def test_the_first_that_fails_raises_its_own_error():
    results = in_order(lambda item: 6 // item, [3, 2, 0, 1], most_at_once=2)
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)
