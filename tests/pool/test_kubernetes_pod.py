"""What runs first in every pod, as processes here: two pods of one machine, found at its loopback address."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tasks.contracts.files import write_json, write_text
from tasks.contracts.job import JobSpec
from tasks.hardware.host import free_port
from tasks.pool import kubernetes_pod
from tasks.pool.kubernetes_pod import PASSED_ON, exit_codes
from tasks.pool.launch import Rendezvous, agent_command
from tasks.pool.torchrun_files import FAILURES
from tests.conftest import REPOSITORY
from tests.pool.any_pool import job


def start(attempt: Path, node: int, host: str, port: int, command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tasks.pool.kubernetes_pod", str(attempt), f"{host}:{port}", *command],
        stdout=subprocess.PIPE,
        text=True,
        cwd=attempt,
        env=os.environ
        | {
            "JOB_COMPLETION_INDEX": str(node),
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONUNBUFFERED": "1",
            "PET_LOCAL_ADDR": "127.0.0.1",
            "PET_RDZV_CONF": "join_timeout=60",
            "GLOO_SOCKET_IFNAME": "lo",
            "TMPDIR": str(attempt / "scratch"),
        },
    )


@pytest.fixture
def attempt(tmp_path):
    folder = tmp_path / "jobs" / "toy" / "001"
    folder.mkdir(parents=True)
    write_text(folder.parent / "NEWEST", "001")
    return folder


def agent(spec: JobSpec, attempt: Path, port: int) -> list[str]:
    write_json(attempt / "spec.json", dataclasses.asdict(spec))
    meeting = Rendezvous("127.0.0.1", port, "toy")
    return agent_command(spec, meeting, spec=str(attempt / "spec.json"), failures=str(attempt / FAILURES))


@pytest.mark.integration
def test_two_pods_meet_though_the_second_starts_long_before_the_first(attempt, tmp_path):
    port = free_port()
    command = agent(job(tmp_path), attempt, port)
    second = start(attempt, 1, "127.0.0.1", port, command)
    time.sleep(2)
    assert second.poll() is None
    first = start(attempt, 0, "127.0.0.1", port, command)
    outputs = [pod.communicate(timeout=120)[0] for pod in (first, second)]
    assert exit_codes(attempt, 2) == [0, 0]
    assert json.loads((attempt / "result.json").read_text())["sum"] == 3
    # What the flow follows and what `kubectl logs` shows are the same.
    for node, output in enumerate(outputs):
        assert "sees the sum 3" in output
        assert (attempt / f"node-{node}.log").read_text() == output


@pytest.mark.integration
def test_a_failing_rank_fails_its_pod_and_leaves_its_own_error(attempt, tmp_path):
    port = free_port()
    command = agent(job(tmp_path, fail_rank=1), attempt, port)
    pods = [start(attempt, node, "127.0.0.1", port, command) for node in (0, 1)]
    for pod in pods:
        pod.communicate(timeout=120)
    assert 0 not in exit_codes(attempt, 2)
    told = [json.loads(path.read_text()) for path in attempt.glob("node-*.failures.json")]
    assert any("rank 1 has a bad value: 42" in str(failure["message"]) for failures in told for failure in failures)


def test_a_request_to_leave_reaches_the_agent_and_its_exit_status_is_the_pods(attempt):
    script = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print('up'); signal.pause()"
    pod = start(attempt, 0, "127.0.0.1", free_port(), [sys.executable, "-c", script])
    assert pod.stdout.readline() == "up\n"
    pod.send_signal(signal.SIGTERM)
    pod.communicate(timeout=20)
    assert (pod.returncode, exit_codes(attempt, 1)) == (75, [75])


def test_a_request_to_leave_before_the_nodes_have_met_is_no_failure(attempt):
    pod = start(attempt, 1, "127.0.0.1", free_port(), [sys.executable, "-c", "print('never')"])
    while "kubernetes_pod" not in Path(f"/proc/{pod.pid}/cmdline").read_text() or not (attempt / "scratch").exists():
        time.sleep(0.05)
    pod.send_signal(signal.SIGTERM)
    pod.communicate(timeout=20)
    assert exit_codes(attempt, 2) == [None, 75]


def test_a_request_to_leave_is_one_from_the_first_moment_on_and_a_second_is_no_other(attempt, monkeypatch):
    before = {number: signal.getsignal(number) for number in PASSED_ON}
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    # Before the log is open, and while how it ended is being written.
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(
        kubernetes_pod, "write_json", lambda *told: (signal.raise_signal(signal.SIGTERM), write_json(*told))
    )
    try:
        assert kubernetes_pod.main(["", str(attempt), f"127.0.0.1:{free_port()}", "true"]) == 75
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert exit_codes(attempt, 2) == [None, 75]


def test_an_agent_that_was_killed_is_told_from_one_that_failed(attempt):
    pod = start(attempt, 0, "127.0.0.1", free_port(), [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    pod.communicate(timeout=20)
    assert exit_codes(attempt, 1) == [128 + 9]


def test_a_rank_that_outlives_its_agent_does_not_hold_the_pod(attempt):
    script = "import subprocess; subprocess.Popen(['sleep', '60'])"
    began = time.monotonic()
    pod = start(attempt, 0, "127.0.0.1", free_port(), [sys.executable, "-c", script])
    timer = threading.Timer(40, pod.kill)
    timer.start()
    pod.wait()
    timer.cancel()
    assert exit_codes(attempt, 1) == [0]
    assert time.monotonic() - began < 20
    pod.stdout.close()


def test_what_a_former_life_left_is_not_taken_for_this_ones(attempt):
    (attempt / "node-0.failures.json").write_text("[]")
    (attempt / "node-0.exit.json").write_text('{"exit_code": 1}')
    pod = start(attempt, 0, "127.0.0.1", free_port(), [sys.executable, "-c", "print('again')"])
    pod.communicate(timeout=20)
    assert exit_codes(attempt, 1) == [0]
    assert not (attempt / "node-0.failures.json").exists()


def test_an_interpreter_that_is_not_there_is_named(attempt):
    pod = start(attempt, 0, "127.0.0.1", free_port(), ["/venv/bin/python9", "-m", "x"])
    output, _ = pod.communicate(timeout=20)
    assert "cannot start" in output
    assert "/venv/bin/python9" in output
    assert exit_codes(attempt, 1) == [1]
