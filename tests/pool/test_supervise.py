"""What a failed job's error says when the disk is full."""

import shutil
from collections import namedtuple

from tasks.contracts.job import JobError
from tasks.pool.supervise import FULL_DISK_BYTES, _with_full_disk

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
