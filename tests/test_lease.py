"""A dead flow must be told from a slow one, on this machine and on others, whatever their clocks say."""

import json
import os
import socket
import subprocess
import sys
import time

import psutil
import pytest

from tasks import lease as leases
from tasks.lease import STALE_AFTER_S, DrivenElsewhere, lease, read_lease


def written_by(path, host, pid, create_time, age_s):
    path.write_text(json.dumps({"flow_run_id": "f", "host": host, "pid": pid, "create_time": create_time}))
    os.utime(path, (time.time() - age_s, time.time() - age_s))


def test_the_lease_is_there_while_the_run_is_driven_and_gone_after(tmp_path):
    with lease(tmp_path / "owner.json", "flow"):
        found = read_lease(tmp_path / "owner.json")
        assert found.is_alive
        assert (found.flow_run_id, found.pid) == ("flow", os.getpid())
    assert read_lease(tmp_path / "owner.json") is None


def test_it_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_S", 0.05)
    with lease(tmp_path / "owner.json", "flow"):
        os.utime(tmp_path / "owner.json", (0, 0))
        deadline = time.monotonic() + 5
        while read_lease(tmp_path / "owner.json").age_s > 100 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert read_lease(tmp_path / "owner.json").age_s < 100


def test_a_killed_process_of_this_machine_is_dead_at_once_and_its_recycled_number_too(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    born = psutil.Process(process.pid).create_time()
    written_by(tmp_path / "owner.json", socket.gethostname(), process.pid, born, 0)
    assert read_lease(tmp_path / "owner.json").is_alive
    written_by(tmp_path / "owner.json", socket.gethostname(), process.pid, born - 5, 0)
    assert not read_lease(tmp_path / "owner.json").is_alive
    written_by(tmp_path / "owner.json", socket.gethostname(), process.pid, born, 0)
    process.kill()
    process.wait()
    assert not read_lease(tmp_path / "owner.json").is_alive


@pytest.mark.parametrize(("age_s", "is_alive"), [(STALE_AFTER_S - 10, True), (STALE_AFTER_S + 10, False)])
def test_another_machines_process_is_judged_by_the_storages_clock(tmp_path, age_s, is_alive):
    written_by(tmp_path / "owner.json", "elsewhere", 1, 0.0, age_s)
    assert read_lease(tmp_path / "owner.json").is_alive is is_alive


def test_a_living_driver_on_this_machine_is_named_and_nothing_is_taken_from_it(tmp_path):
    path = tmp_path / "owner.json"
    parent = psutil.Process(os.getppid())
    written_by(path, socket.gethostname(), parent.pid, parent.create_time(), 0)
    before = path.read_text()
    with pytest.raises(DrivenElsewhere, match=f"process {parent.pid} on .*another --run"), lease(path, "mine"):
        pass
    assert path.read_text() == before


def test_a_retry_on_another_machine_waits_for_the_lease_to_run_out(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "STALE_AFTER_S", 2.0)
    written_by(tmp_path / "owner.json", "dead-pod", 1, 0.0, 0)
    began = time.monotonic()
    with lease(tmp_path / "owner.json", "mine"):
        assert time.monotonic() - began >= 1
        assert read_lease(tmp_path / "owner.json").flow_run_id == "mine"


def test_a_driver_on_another_machine_that_renews_is_left_alone(tmp_path, monkeypatch):
    path = tmp_path / "owner.json"
    written_by(path, "elsewhere", 1, 0.0, 60)
    looks = []

    def renewed(seconds):
        looks.append(seconds)
        written_by(path, "elsewhere", 1, 0.0, 0)

    monkeypatch.setattr(leases.time, "sleep", renewed)
    with pytest.raises(DrivenElsewhere, match="process 1 on elsewhere"), lease(path, "mine"):
        pass
    assert len(looks) == 1
