"""The Slurm pool on a real cluster of two nodes: ``make test-slurm``, or with SLURM_CONF naming one."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tasks.contracts.files import read_json
from tasks.contracts.job import JobFailed, JobState, PoolError
from tasks.contracts.pool_settings import SlurmSettings
from tasks.pool.slurm import SlurmPool
from tasks.pool.supervise import Watch, supervise
from tests.conftest import REPOSITORY
from tests.pool.any_pool import AnyPool, attempts, job, running_to_its_end, wait_for
from tests.processes import processes_under

CLUSTER = REPOSITORY / "infra" / "slurm" / "local-cluster.sh"
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", autouse=True)
def cluster():
    if "SLURM_CONF" not in os.environ or shutil.which("sinfo") is None:
        pytest.skip("no Slurm here: make test-slurm starts one")
    subprocess.run(["sinfo"], check=True, capture_output=True)


@pytest.fixture
def pool():
    # Both nodes are this machine, whose name need not resolve.
    return SlurmPool(SlurmSettings(env={"PET_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}))


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path):
    yield
    deadline = time.monotonic() + 20
    while (left := processes_under(tmp_path) or _jobs()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


def _jobs() -> list[str]:
    return subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout.splitlines()


def number(handle) -> str:
    return read_json(Path(handle) / "handle.json")["slurm_job_id"]


def test_cancel_is_complete_when_it_returns(pool, tmp_path):
    handle = pool.submit(job(tmp_path, hang=True))
    wait_for(pool, handle, "rank 0 sees the sum")
    pool.cancel(handle)
    assert not processes_under(tmp_path)
    assert not _jobs()


def test_scancel_from_outside_is_a_cancelled_job(pool, tmp_path):
    handle = pool.submit(job(tmp_path, hang=True))
    wait_for(pool, handle, "rank 0 sees the sum")
    subprocess.run(["scancel", number(handle)], check=True)
    with pytest.raises(JobFailed, match="cancelled: Slurm's job .* ended as CANCELLED"):
        supervise(pool, job(tmp_path, hang=True), Watch())


def test_a_job_whose_number_was_lost_is_found_by_its_comment(pool, tmp_path):
    handle = pool.submit(job(tmp_path, hang=True))
    before = number(handle)
    (Path(handle) / "handle.json").unlink()
    assert pool.submit(job(tmp_path, hang=True)) == handle
    assert number(handle) == before
    pool.cancel(handle)


def test_a_lost_node_requeues_the_job_and_it_ends_well(pool, tmp_path):
    result = {}
    thread = threading.Thread(target=lambda: result.update(supervise(pool, job(tmp_path, pause_s=12), Watch())))
    handle = pool.submit(job(tmp_path, pause_s=12))
    wait_for(pool, handle, "rank 1 sees the sum")
    thread.start()
    subprocess.run([CLUSTER, "kill", "1"], check=True)
    deadline = time.monotonic() + 120
    while pool.state(handle) is not JobState.QUEUED and time.monotonic() < deadline:
        time.sleep(0.2)
    assert pool.state(handle) is JobState.QUEUED
    subprocess.run([CLUSTER, "start", "1"], check=True, capture_output=True)
    thread.join(240)
    assert result["sum"] == 3
    told = subprocess.run(
        ["scontrol", "show", "job", number(handle)], capture_output=True, text=True, check=True
    ).stdout
    assert "Restarts=1" in told


def test_without_another_node_in_time_it_goes_on_with_fewer(pool, tmp_path):
    spec = job(tmp_path, hang=2, fallback_num_nodes=(1,), replacement_limit_s=3)
    handle = pool.submit(spec)
    wait_for(pool, handle, "rank 1 sees the sum")
    try:
        with running_to_its_end(pool, spec, max_retries=0) as outcome:
            subprocess.run([CLUSTER, "kill", "1"], check=True)
    finally:
        subprocess.run([CLUSTER, "start", "1"], check=True, capture_output=True)
    assert outcome.result["sum"] == 1
    assert "going on with 1 of 2 nodes" in outcome.whys[-1]
    assert attempts(tmp_path) == ["001", "002"]


def test_ranks_that_slurm_tells_to_leave_go_on_in_a_new_attempt(pool, tmp_path):
    spec = job(tmp_path, hang=2, leaves=True)
    handle = pool.submit(spec)
    wait_for(pool, handle, "rank 1 sees the sum")
    with running_to_its_end(pool, spec, max_retries=0) as outcome:
        # As Slurm does ahead of a time limit (--signal=USR1@120) and when it preempts.
        subprocess.run(["scancel", "--signal=USR1", number(handle)], check=True)
    assert outcome.result["sum"] == 3
    assert outcome.whys[0].startswith("the ranks were told to leave, and left")
    assert attempts(tmp_path) == ["001", "002"]


def test_a_controller_that_restarts_loses_nothing(pool, tmp_path):
    handle = pool.submit(job(tmp_path, pause_s=60))
    wait_for(pool, handle, "rank 0 sees the sum")
    pattern = f"slurmctld -f {os.environ['SLURM_CONF']}"
    # Slurm's commands ask again for some time before they give up: the job must last longer than that.
    subprocess.run(["pkill", "-KILL", "-f", pattern], check=True)
    assert pool.state(handle) is JobState.UNKNOWN
    with pytest.raises(PoolError, match="may still run"):
        pool.submit(job(tmp_path, pause_s=60))
    subprocess.run(["slurmctld", "-f", os.environ["SLURM_CONF"]], check=True)
    assert supervise(pool, job(tmp_path, pause_s=60), Watch())["sum"] == 3


def test_a_wrong_partition_is_refused_in_slurms_words_and_nothing_is_left(tmp_path):
    wrong = SlurmPool(SlurmSettings(partition="nowhere"))
    with pytest.raises(PoolError, match="invalid partition specified: nowhere"):
        wrong.submit(job(tmp_path))
    assert not _jobs()


def test_more_nodes_than_there_are_wait_with_a_reason_and_are_withdrawn(pool, tmp_path):
    waiting: list[str] = []
    with pytest.raises(JobFailed, match=r"still queued after 0\.1 minutes \(.*(Nodes|Partition)"):
        supervise(pool, job(tmp_path, num_nodes=3, queue_limit_s=6), Watch(on_waiting=waiting.append))
    assert not _jobs()


def test_a_full_queue_is_waited_for_and_says_why(pool, tmp_path):
    first = pool.submit(job(tmp_path, name="first", hang=True))
    wait_for(pool, first, "sees the sum")
    # The nodes' processors are all taken.
    whole = SlurmPool(SlurmSettings(exclusive=True))
    waiting: list[str] = []
    with pytest.raises(JobFailed, match=r"still queued after 0\.1 minutes \((Resources|Priority)"):
        supervise(whole, job(tmp_path, name="second", queue_limit_s=6), Watch(on_waiting=waiting.append))
    assert waiting
    pool.cancel(first)


def test_a_job_beyond_its_time_limit_says_so(tmp_path):
    short = SlurmPool(SlurmSettings(env={"PET_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}, requeue=False))
    with pytest.raises(JobFailed, match="TIMEOUT"):
        supervise(short, job(tmp_path, hang=True, time_limit_s=60), Watch())


def test_a_flow_killed_hard_leaves_a_job_that_another_adopts(pool, tmp_path):
    script = (
        "import sys; from tests.pool.test_slurm import *;"
        "supervise(SlurmPool(SlurmSettings(env={'PET_LOCAL_ADDR': '127.0.0.1', 'GLOO_SOCKET_IFNAME': 'lo'})),"
        f"job(Path({str(tmp_path)!r}), pause_s=10), Watch())"
    )
    flow = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY)
    attempt = tmp_path / "jobs" / "toy" / "001"
    wait_for(pool, str(attempt), "rank 0 sees the sum")
    flow.kill()
    flow.wait()
    assert supervise(pool, job(tmp_path, pause_s=10), Watch())["sum"] == 3
    assert attempts(tmp_path) == ["001"]


class TestSlurmPool(AnyPool):
    """What every pool must do."""
