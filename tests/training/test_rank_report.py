"""What ranks tell of themselves names the one that holds the others up."""

import pytest

from tasks.training.rank_report import RankReport, RankReports
from tests.training import toy
from tests.training.toy_ranks import ToyJob


def report(work_us: int, **figures: int) -> RankReport:
    none = {"signal": 0, "wait_us": 0, "network_kbytes": 0, "storage_kbytes": 0}
    return RankReport(**{**none, "work_us": work_us, **figures})


def test_what_is_sent_is_what_is_read_and_the_rows_after_it_stay():
    mine = RankReport(15, 2000, 300, 40, 5)
    assert RankReport.read([*mine.numbers(), 7, 8]) == (mine, [7, 8])


def test_the_slow_one_of_two_is_compared_with_the_other_and_not_with_their_mean():
    reports = RankReports()
    for _ in range(3):
        reports.add([report(3000), report(2000)])
    metrics, words = reports.take()
    assert (metrics["train/slowest_rank"], metrics["train/slowest_rank_work_ratio"]) == (0, 1.5)
    assert words == "rank 0 is slow: its own work takes 1.50 times the others'"
    assert metrics["rank/001/work_seconds"] == pytest.approx(0.002)


def test_equal_ranks_are_not_spoken_of_and_a_window_is_told_once():
    reports = RankReports()
    reports.add([report(2000, wait_us=500_000), report(2100)])
    metrics, words = reports.take()
    assert words == ""
    assert metrics["train/data_wait_seconds"] == 0.5
    assert reports.take() == ({}, "")


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
    assert "rank 1 is slow: its own work takes" in attempt.output()
    last = toy.points(job.folder)[12]
    assert last["train/slowest_rank"] == 1
    assert last["train/slowest_rank_work_ratio"] > 2
    assert last["train/step_seconds"] > 0.4
    assert last["train/checkpoint_held_seconds"] > 0
