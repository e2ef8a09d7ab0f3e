"""What is said of a job that ended badly: a full disk, and a scheduler that does not end it."""

import shutil
from collections import namedtuple

import pytest

from tasks.contracts.job import JobError, JobSpec, JobState, MayStillRun, PoolError
from tasks.pool.supervise import FULL_DISK_BYTES, Watch, _with_full_disk, supervise

Usage = namedtuple("Usage", "total used free")


def test_a_full_disk_is_named_before_the_error_that_names_none(tmp_path, monkeypatch):
    error = JobError("rank 0 (node 0): unexpected pos 8401152", rank=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1_200_000))
    named = _with_full_disk(error, tmp_path)
    assert named.summary.startswith(f"No space left on device: 1.2 MB are free at {tmp_path}; free some")
    assert error.summary in named.summary
    assert named.rank == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, FULL_DISK_BYTES))
    assert _with_full_disk(error, tmp_path) is error


class Unreachable:
    """A pool whose scheduler goes away after the job was submitted."""

    def __init__(self, folder):
        self.folder = folder

    def submit(self, job):
        return str(self.folder)

    def state(self, handle):
        return JobState.UNKNOWN

    def logs(self, handle):
        yield None

    def cancel(self, handle):
        raise PoolError("scancel: no controller")


def test_a_job_that_cannot_be_cancelled_is_said_to_run_still_and_why_it_had_to_end(tmp_path):
    job = JobSpec("toy", "m", {}, str(tmp_path))
    with pytest.raises(
        MayStillRun, match="toy may still run .*: scancel: no controller\nIt had to end for this: job toy stopped"
    ):
        supervise(Unreachable(tmp_path), job, Watch(should_stop=lambda: True))
