"""torchrun's agent: what it prepares on its node before any rank starts, and what it leaves when it is told to go."""

import json
import os
import signal
import time
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from tasks.pool import torchrun_agent


@pytest.fixture
def ranks():
    """Those that there are."""
    return []


@pytest.fixture
def run(tmp_path, monkeypatch, ranks):
    """Runs the agent with something in torchrun's place; its exit status."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "local" / "scratch"))
    monkeypatch.setenv("PET_SIGNALS_TO_HANDLE", "")
    # Of this process others may be left, which are no ranks.
    monkeypatch.setattr(torchrun_agent.psutil, "Process", lambda: SimpleNamespace(children=lambda: [*ranks]))
    monkeypatch.setattr(torchrun_agent, "_requested", set())
    # A test's own limit.
    limit = signal.setitimer(signal.ITIMER_REAL, 0)
    numbers = (*torchrun_agent.REQUESTS_TO_LEAVE, signal.SIGALRM)
    handlers = {number: signal.getsignal(number) for number in numbers}

    def run(torchrun):
        monkeypatch.setattr(torchrun_agent, "torchrun", lambda options: torchrun())
        return torchrun_agent.main(["agent", str(tmp_path / "node-{node}.failures.json")])

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.setitimer(signal.ITIMER_REAL, *limit)


def test_the_nodes_scratch_is_there_before_a_rank_starts(run, tmp_path):
    seen = []
    assert run(lambda: seen.append((tmp_path / "local" / "scratch").is_dir())) == 0
    assert seen == [True]


def test_a_request_to_leave_that_comes_when_ranks_have_ended_does_not_hide_how(run, tmp_path, monkeypatch):
    failure = SimpleNamespace(
        exitcode=1, message="a bad value: 42", timestamp=7, error_file_data={}, local_rank=0, pid=1
    )
    monkeypatch.setattr(ChildFailedError, "format_msg", lambda self: "failed")

    def end():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        raise ChildFailedError("toy", {1: failure})

    assert run(end) == 1
    (told,) = json.loads((tmp_path / "node-0.failures.json").read_text())
    assert (told["rank"], told["message"]) == (1, "a bad value: 42")
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_request_to_leave_while_other_nodes_are_waited_for_is_obeyed(run, monkeypatch):
    monkeypatch.setattr(torchrun_agent, "GRACE_S", 0.2)

    def wait():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with pytest.raises(SystemExit) as left:
        run(wait)
    assert left.value.code == 75


def test_ranks_that_begin_just_after_a_request_to_leave_are_told(run, ranks, monkeypatch):
    monkeypatch.setattr(torchrun_agent, "GRACE_S", 0.2)
    told = []
    failure = SimpleNamespace(exitcode=75, message="", timestamp=7, error_file_data={}, local_rank=0, pid=1)
    monkeypatch.setattr(ChildFailedError, "format_msg", lambda self: "failed")

    def begin():
        os.kill(os.getpid(), signal.SIGTERM)
        ranks.append(SimpleNamespace(send_signal=told.append))
        time.sleep(0.5)
        raise ChildFailedError("toy", {0: failure})

    assert run(begin) == 75
    assert told == [signal.SIGTERM]
