"""The local pool on real GPUs, two or more: who gets which, and who waits."""

import dataclasses
import re
import time
from pathlib import Path

import pytest

from tasks.contracts.job import JobState
from tasks.hardware.gpus import visible_gpus
from tasks.pool.local import LocalPool
from tasks.pool.supervise import Watch, supervise
from tests.pool.any_pool import job, wait_for

pytestmark = [
    pytest.mark.integration,
    pytest.mark.gpu,
    pytest.mark.skipif(len(visible_gpus()) < 2, reason="needs two GPUs"),
]


@pytest.fixture
def pool(tmp_path):
    return LocalPool(tmp_path / "pool")


def gpu_job(tmp_path: Path, name: str, num_nodes: int, **arguments):
    return dataclasses.replace(job(tmp_path, name=name, num_nodes=num_nodes, **arguments), gpus=True)


def gpus_of(handle) -> set[str]:
    logs = "".join(path.read_text() for path in Path(handle).glob("node-*.log"))
    return set(re.findall(r"has ([0-9a-f-]{36}) of GPU-\1", logs))


def test_two_jobs_run_side_by_side_on_gpus_of_their_own_and_a_wide_one_waits(pool, tmp_path):
    first = pool.submit(gpu_job(tmp_path, "first", 1, hang=True))
    wait_for(pool, first, "has ")
    # Another storage folder: the GPUs are the machine's all the same.
    second = LocalPool(tmp_path / "other").submit(gpu_job(tmp_path, "second", 1, hang=True))
    wait_for(pool, second, "has ")
    assert len(gpus_of(first)) == len(gpus_of(second)) == 1
    assert not gpus_of(first) & gpus_of(second)
    wide = pool.submit(gpu_job(tmp_path, "wide", len(visible_gpus())))
    time.sleep(2)
    assert pool.state(wide) is JobState.QUEUED
    assert pool.explain(wide) == "other jobs have the GPUs"
    pool.cancel(first)
    pool.cancel(second)
    total = sum(range(len(visible_gpus()) + 1))
    assert supervise(pool, gpu_job(tmp_path, "wide", len(visible_gpus())), Watch())["sum"] == total
    assert len(gpus_of(wide)) == len(visible_gpus())


def test_gpus_are_shared_where_that_is_asked_for(tmp_path):
    pool = LocalPool(tmp_path / "pool", share_gpus=True)
    handles = [pool.submit(gpu_job(tmp_path, name, 1, hang=True)) for name in ("first", "second")]
    for handle in handles:
        wait_for(pool, handle, "has ")
    assert gpus_of(handles[0]) == gpus_of(handles[1])
    for handle in handles:
        pool.cancel(handle)
