"""Jobs of several processes never share a GPU, and a dead one's are free at once."""

import multiprocessing
import signal
import threading
import time

import pytest

from tasks.hardware.gpus import narrowed
from tasks.pool.turns import LOOK_S, _take, turn_at_gpus

FORK = multiprocessing.get_context("spawn")


def hold(gpus, wanted, queue, seconds):
    with turn_at_gpus(gpus, wanted, lambda: None) as mine:
        queue.put(("took", mine, time.monotonic()))
        time.sleep(seconds)
        queue.put(("gave", mine, time.monotonic()))


@pytest.fixture
def gpus(tmp_path):
    # The names are the machine's: another test run beside this one has its own.
    return [f"GPU-{tmp_path}-{i}" for i in range(4)]


def test_no_two_jobs_ever_hold_one_gpu_and_all_get_their_turn(gpus):
    queue = FORK.Queue()
    jobs = [FORK.Process(target=hold, args=(gpus, wanted, queue, 0.3)) for wanted in (4, 4, 2, 1, 3, 2)]
    for job in jobs:
        job.start()
    events = sorted((queue.get(timeout=60) for _ in range(2 * len(jobs))), key=lambda event: event[2])
    for job in jobs:
        job.join()
    held: set[str] = set()
    for what, mine, _ in events:
        if what == "took":
            assert not held & set(mine)
            held |= set(mine)
        else:
            held -= set(mine)
    assert sorted(len(mine) for what, mine, _ in events if what == "took") == [1, 2, 2, 3, 4, 4]


def test_a_killed_job_gives_its_gpus_back(gpus):
    queue = FORK.Queue()
    job = FORK.Process(target=hold, args=(gpus, 4, queue, 600))
    job.start()
    assert queue.get(timeout=60)[0] == "took"
    told: list[float] = []

    def end_it() -> None:
        told.append(time.monotonic())
        threading.Timer(5 * LOOK_S, job.kill).start()

    with turn_at_gpus(gpus, 4, end_it) as mine:
        assert mine == gpus
        took = time.monotonic()
    job.join()
    assert job.exitcode == -signal.SIGKILL
    # Once, however often it looked; and who need not wait is not told to.
    assert len(told) == 1
    assert took - told[0] > 4 * LOOK_S
    with turn_at_gpus(gpus, 4, lambda: pytest.fail("nobody has them")) as mine:
        assert mine == gpus


def test_another_job_that_only_gathers_has_no_gpu(gpus):
    gathers = _take("gathering")
    assert gathers is not None
    threading.Timer(LOOK_S / 2, gathers.close).start()
    with turn_at_gpus(gpus, 4, lambda: pytest.fail("all GPUs are free")) as mine:
        assert mine == gpus


def test_more_than_there_are_is_said_and_not_waited_for(gpus):
    with pytest.raises(ValueError, match="5 GPUs are wanted and there are 4"), turn_at_gpus(gpus, 5, lambda: None):
        pass


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [(None, "abcd"), ("", ""), ("2,0", "ca"), ("1,7,0", "b"), ("GPU-d,GPU-a", "da"), ("0,0", "a"), ("-1", "")],
)
def test_the_gpus_that_the_environment_hides_are_not_ours(wanted, chosen):
    assert narrowed([f"GPU-{name}" for name in "abcd"], wanted) == [f"GPU-{name}" for name in chosen]
