"""What ranks tell of themselves names the one that holds the others up."""

import time

import pytest

from tasks.hardware.telemetry import Sampler
from tasks.training.rank_report import RankClock, RankReport, RankReports
from tests.training import toy
from tests.training.toy_ranks import ToyJob


def report(work_us: int, **figures: int) -> RankReport:
    none = {"signal": 0, "work_tokens": 100, "wait_us": 0, "network_kbytes": 0, "storage_kbytes": 0}
    return RankReport(**{**none, "work_us": work_us, **figures})


def test_what_is_sent_is_what_is_read_and_the_rows_after_it_stay():
    mine = RankReport(15, 2000, 100, 300, 40, 5)
    assert RankReport.read([*mine.numbers(), 7, 8]) == (mine, [7, 8])


def test_the_slow_one_of_two_is_compared_with_the_other_and_not_with_their_mean():
    reports = RankReports()
    for _ in range(3):
        reports.add([report(3000), report(2000)])
    metrics, words = reports.take()
    assert (metrics["train/slowest_rank"], metrics["train/slowest_rank_work_ratio"]) == (0, 1.5)
    assert words == "rank 0 is slow: its work on a token takes 1.50 times the others'"
    assert metrics["rank/001/work_us_per_token"] == pytest.approx(20)


def test_equal_ranks_are_not_spoken_of_and_a_window_is_told_once():
    reports = RankReports()
    reports.add([report(2000, wait_us=500_000), report(2100)])
    metrics, words = reports.take()
    assert words == ""
    assert metrics["train/data_wait_seconds"] == 0.5
    assert reports.take() == ({}, "")


def test_a_rank_with_the_longer_conversations_is_not_slow():
    reports = RankReports()
    reports.add([report(3000, work_tokens=150), report(2000)])
    metrics, words = reports.take()
    assert (metrics["train/slowest_rank_work_ratio"], words) == (1.0, "")


def test_memory_is_the_fullest_gpus_and_use_the_mean_of_all():
    reports = RankReports()
    hot = {"gpu_use_percent": 90, "gpu_memory_permille": 800, "gpu_power_watts": 600, "gpu_temperature_celsius": 70}
    cool = {"gpu_use_percent": 70, "gpu_memory_permille": 700, "gpu_power_watts": 500, "gpu_temperature_celsius": 60}
    reports.add([report(2000, **hot), report(2000, **cool)])
    metrics, _ = reports.take()
    assert (metrics["gpu/utilization"], metrics["gpu/memory_share"]) == pytest.approx((0.8, 0.8))
    assert (metrics["gpu/power_watts"], metrics["gpu/temperature_celsius"]) == (550, 70)
    assert metrics["rank/001/gpu_memory_share"] == pytest.approx(0.7)


class Event:
    """As CUDA's: recorded at once, over when the GPU has come so far."""

    now = 0.0

    def __init__(self, at_ms: float) -> None:
        self.at_ms = at_ms

    def query(self) -> bool:
        return Event.now >= self.at_ms

    def elapsed_time(self, other: "Event") -> float:
        return other.at_ms - self.at_ms


def test_a_gpu_that_is_a_step_behind_is_told_of_a_step_later(monkeypatch):
    clock = RankClock(local_rank=0, gpu=Sampler(None))
    # What each step's marks will be, in milliseconds of the GPU's time: it works on a step for 20 and then 40.
    marks = iter([Event(0), Event(20), Event(30), Event(70), Event(80), Event(95)])
    monkeypatch.setattr(clock, "_is_gpu", True)
    monkeypatch.setattr(clock, "_mark", lambda: next(marks))
    told = []
    for step, now in enumerate((0, 10, 50, 100)):
        Event.now = now
        own = clock.report(0)
        told.append((own.work_us, own.work_tokens))
        if step < 3:
            clock.begin(100 * (step + 1))
            clock.end()
    assert told == [(0, 0), (0, 0), (20_000, 100), (15_000, 300)]


def test_without_a_gpu_there_are_no_figures_of_one():
    reports = RankReports()
    reports.add([report(2000), report(2000)])
    assert not [name for name in reports.take()[0] if "gpu" in name]


def test_the_samples_of_a_gpu_are_sent_once_and_the_last_ones_stand_until_there_are_new_ones():
    sample = {"use_percent": 90, "memory_share": 0.8, "power_watts": 500, "temperature_celsius": 55}
    with Sampler(lambda: sample, every_s=0.001) as gpu:
        clock = RankClock(local_rank=0, gpu=gpu)
        deadline = time.monotonic() + 20
        while not (first := clock.report(0)).gpu_use_percent and time.monotonic() < deadline:
            time.sleep(0.01)
    gpu.take()
    second = clock.report(0)
    for told in (first, second):
        assert (told.gpu_use_percent, told.gpu_memory_permille, told.gpu_power_watts) == (90, 800, 500)


def test_a_driver_that_stops_answering_leaves_no_figures_that_look_new():
    answers = [{"use_percent": 90, "memory_share": 0.8, "power_watts": 500, "temperature_celsius": 55}]
    with Sampler(answers.pop, every_s=0.001) as gpu:
        clock = RankClock(local_rank=0, gpu=gpu)
        deadline = time.monotonic() + 20
        while gpu.error is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert gpu.error == "IndexError: pop from empty list"
        assert clock.report(0).gpu_memory_permille == 0


@pytest.mark.integration
def test_a_slow_rank_is_named_in_the_log_and_the_metrics(tmp_path):
    toy.make_model(tmp_path / "model")
    toy.make_rows(tmp_path / "dataset")
    settings = {"num_epochs": 1, "log_every_steps": 6}
    job = ToyJob(
        tmp_path / "run", toy.arguments(tmp_path / "run", tmp_path / "model", tmp_path / "dataset", **settings)
    )
    attempt = job.start(2, slow={"rank": 1, "seconds": 0.2})
    assert attempt.wait() == [0, 0], attempt.output()
    assert "rank 1 is slow: its work on a token takes" in attempt.output()
    last = toy.points(job.folder)[12]
    assert last["train/slowest_rank"] == 1
    assert last["train/slowest_rank_work_ratio"] > 2
    assert last["train/step_seconds"] > 0.4
    assert last["train/useful_tflops_per_s_per_gpu"] > 0
    assert "train/mfu" not in last
    assert last["train/checkpoint_held_seconds"] > 0
