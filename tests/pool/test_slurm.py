"""The Slurm pool on a real cluster of two nodes: ``make test-slurm``, or with SLURM_CONF naming one."""

import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks.contracts.files import read_json
from tasks.contracts.job import JobFailed, JobSpec, JobState, LogLine, PoolError
from tasks.contracts.settings import SlurmSettings
from tasks.pool.slurm import SlurmPool
from tasks.pool.supervise import Interrupted, Watch, supervise
from tests.processes import processes_under

REPOSITORY = Path(__file__).resolve().parents[2]
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


def job(tmp_path: Path, name: str = "toy", **arguments) -> JobSpec:
    settings = {key: arguments.pop(key) for key in ("time_limit_s", "num_nodes", "queue_limit_s") if key in arguments}
    return JobSpec(
        name=name,
        module="tests.pool.toy_job",
        arguments=arguments,
        folder=str(tmp_path / "jobs" / name),
        env={"PYTHONPATH": str(REPOSITORY)},
        **{"num_nodes": 2, "time_limit_s": 300} | settings,
    )


def wait_for(pool, handle, text: str, limit_s: float = 90) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if any(text in log.read_text() for log in Path(handle).glob("node-*.log")):
            return
        time.sleep(0.1)
    log = Path(handle) / "slurm.log"
    pytest.fail(f"{text!r} never appeared; {pool.state(handle)}: {log.read_text() if log.exists() else 'no log'}")


def number(handle) -> str:
    return read_json(Path(handle) / "handle.json")["slurm_job_id"]


def test_two_nodes_meet_and_leave_a_result(pool, tmp_path):
    lines: list[LogLine] = []
    states: list[JobState] = []
    result = supervise(pool, job(tmp_path), Watch(on_line=lines.append, on_state=states.append))
    assert result["sum"] == 3
    assert states[-1] is JobState.SUCCEEDED
    assert {line.node for line in lines if "sees the sum 3" in line.text} == {0, 1}
    # The same name again is the same job: nothing runs a second time.
    assert supervise(pool, job(tmp_path), Watch()) == result
    assert [p.name for p in (tmp_path / "jobs" / "toy").iterdir() if p.name.isdigit()] == ["001"]


def test_the_failing_ranks_own_error_is_shown_and_not_its_peers(pool, tmp_path):
    with pytest.raises(JobFailed) as caught:
        supervise(pool, job(tmp_path, fail_rank=1), Watch())
    # Which node a rank is on is what the rendezvous made of it; the node that is named must be the rank's own.
    error = caught.value.error
    assert error.rank == 1
    assert "rank 1 sees the sum" in (tmp_path / "jobs" / "toy" / "001" / f"node-{error.node}.log").read_text()
    assert "rank 1 has a bad value: 42" in caught.value.error.summary
    assert "raise ValueError" in caught.value.error.traceback


def test_cancel_is_complete_when_it_returns(pool, tmp_path):
    handle = pool.submit(job(tmp_path, hang=True))
    wait_for(pool, handle, "rank 0 sees the sum")
    pool.cancel(handle)
    assert not processes_under(tmp_path)
    assert not _jobs()
    assert pool.state(handle) is JobState.CANCELLED
    # A cancelled attempt is not adopted: the next one is new.
    again = pool.submit(job(tmp_path, hang=True))
    assert again != handle
    pool.cancel(again)


def test_a_request_to_stop_cancels_the_job(pool, tmp_path):
    stop = threading.Event()
    threading.Timer(4, stop.set).start()
    with pytest.raises(Interrupted):
        supervise(pool, job(tmp_path, hang=True), Watch(should_stop=stop.is_set))


def test_scancel_from_outside_is_a_cancelled_job(pool, tmp_path):
    handle = pool.submit(job(tmp_path, hang=True))
    wait_for(pool, handle, "rank 0 sees the sum")
    subprocess.run(["scancel", number(handle)], check=True)
    with pytest.raises(JobFailed, match="cancelled: Slurm's job .* ended as CANCELLED"):
        supervise(pool, job(tmp_path, hang=True), Watch())


def test_fifty_submits_of_one_name_are_one_job(pool, tmp_path):
    with ThreadPoolExecutor(50) as executor:
        handles = set(executor.map(lambda _: pool.submit(job(tmp_path, hang=True)), range(50)))
    assert len(handles) == 1
    assert len(_jobs()) == 1
    pool.cancel(handles.pop())


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
    with pytest.raises((JobFailed, PoolError), match=r"(?i)still queued after .*minutes|node count|not available"):
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
    assert [p.name for p in attempt.parent.iterdir() if p.name.isdigit()] == ["001"]
