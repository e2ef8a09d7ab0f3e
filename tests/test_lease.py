"""A dead flow must be told from a slow one, on this machine and on others, whatever their clocks say."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from tasks import lease as leases
from tasks.contracts.job import PoolError
from tasks.lease import STALE_AFTER_S, DrivenElsewhere, lease, read_lease
from tasks.pool.process_identity import identity_of


def nothing() -> None:
    pytest.fail("the lease was lost")


def written_by(path, host, pid, process, age_s):
    path.write_text(json.dumps({"flow_run_id": "f", "host": host, "pid": pid, "process": process}))
    os.utime(path, (time.time() - age_s, time.time() - age_s))


def test_the_lease_is_there_while_the_run_is_driven_and_gone_after(tmp_path):
    with lease(tmp_path / "owner.json", "flow", nothing):
        found = read_lease(tmp_path / "owner.json")
        assert found.is_alive
        assert (found.flow_run_id, found.pid) == ("flow", os.getpid())
    assert read_lease(tmp_path / "owner.json") is None


def test_it_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_S", 0.05)
    with lease(tmp_path / "owner.json", "flow", nothing):
        os.utime(tmp_path / "owner.json", (0, 0))
        deadline = time.monotonic() + 5
        while read_lease(tmp_path / "owner.json").age_s > 100 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert read_lease(tmp_path / "owner.json").age_s < 100


def test_a_killed_process_of_this_machine_is_dead_at_once_and_its_recycled_number_too(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    born = identity_of(process.pid)
    written_by(tmp_path / "owner.json", socket.gethostname(), process.pid, born, 0)
    assert read_lease(tmp_path / "owner.json").is_alive
    written_by(tmp_path / "owner.json", socket.gethostname(), process.pid, born + "5", 0)
    assert not read_lease(tmp_path / "owner.json").is_alive
    written_by(tmp_path / "owner.json", socket.gethostname(), process.pid, born, 0)
    process.kill()
    process.wait()
    assert not read_lease(tmp_path / "owner.json").is_alive


@pytest.mark.parametrize(("age_s", "is_alive"), [(STALE_AFTER_S - 10, True), (STALE_AFTER_S + 10, False)])
def test_another_machines_process_is_judged_by_the_storages_clock(tmp_path, age_s, is_alive):
    written_by(tmp_path / "owner.json", "elsewhere", 1, "boot/0", age_s)
    assert read_lease(tmp_path / "owner.json").is_alive is is_alive


def test_a_living_driver_on_this_machine_is_named_and_nothing_is_taken_from_it(tmp_path):
    path = tmp_path / "owner.json"
    parent = os.getppid()
    written_by(path, socket.gethostname(), parent, identity_of(parent), 0)
    before = path.read_text()
    with pytest.raises(DrivenElsewhere, match=f"process {parent} on .*another --run"), lease(path, "mine", nothing):
        pass
    assert path.read_text() == before


def test_a_retry_on_another_machine_waits_for_the_lease_to_run_out(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "STALE_AFTER_S", 2.0)
    written_by(tmp_path / "owner.json", "dead-pod", 1, "boot/0", 0)
    began = time.monotonic()
    with lease(tmp_path / "owner.json", "mine", nothing):
        assert time.monotonic() - began >= 1
        assert read_lease(tmp_path / "owner.json").flow_run_id == "mine"


def test_a_driver_on_another_machine_that_renews_is_left_alone(tmp_path, monkeypatch):
    path = tmp_path / "owner.json"
    written_by(path, "elsewhere", 1, "boot/0", 60)
    looks = []

    def renewed(seconds):
        looks.append(seconds)
        # As its driver does: under the lock, which a waiting process must not keep.
        with leases._one_at_a_time(path):
            written_by(path, "elsewhere", 1, "boot/0", 0)

    monkeypatch.setattr(leases.time, "sleep", renewed)
    with pytest.raises(DrivenElsewhere, match="process 1 on elsewhere"), lease(path, "mine", nothing):
        pass
    assert len(looks) == 1


def test_a_process_that_stood_still_does_not_take_the_run_back_from_its_successor(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_S", 0.05)
    lost = threading.Event()
    with lease(tmp_path / "owner.json", "slow", lost.set):
        written_by(tmp_path / "owner.json", "elsewhere", 1, "boot/0", 0)
        assert lost.wait(5)
    assert read_lease(tmp_path / "owner.json").host == "elsewhere"


def test_of_two_that_find_a_run_free_at_the_same_moment_one_gets_it(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from tasks.lease import *\n"
        "while time.time() < float(sys.argv[2]): pass\n"
        "with lease(Path(sys.argv[1]), 'x', lambda: None): time.sleep(3)"
    )
    at = str(time.time() + 4)
    flows = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "owner.json"), at], stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    said = [flow.communicate(timeout=60)[1] for flow in flows]
    assert sorted(flow.returncode for flow in flows) == [0, 1, 1]
    assert sum("is driven by another process" in text for text in said) == 2


def test_what_a_scheduler_may_still_run_is_left_to_reconcile(tmp_path):
    with pytest.raises(PoolError), lease(tmp_path / "owner.json", "mine", nothing):
        raise PoolError("job toy may still run")
    assert read_lease(tmp_path / "owner.json").flow_run_id == "mine"
