"""What is launched, whole, and which failure is the cause."""

import sys

import pytest

from tasks.contracts.job import FailureKind, JobSpec
from tasks.pool.failures import first_failure
from tasks.pool.launch import Rendezvous, agent_command


def test_the_whole_torchrun_command():
    job = JobSpec("run-train", "tasks.training", {}, "/f", num_nodes=2, processes_per_node=8)
    command = agent_command(
        job,
        Rendezvous("10.0.0.1", 29500, "run-train-001"),
        spec="/f/001/spec.json",
        failures="/f/001/node-{node}.failures.json",
    )
    assert command == [
        sys.executable,
        "-m",
        "tasks.pool.torchrun_agent",
        "/f/001/node-{node}.failures.json",
        "--nnodes=2",
        "--nproc-per-node=8",
        "--max-restarts=0",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=10.0.0.1:29500",
        "--rdzv-id=run-train-001",
        "--module",
        "tasks.training",
        "/f/001/spec.json",
    ]


def failure(rank, exit_code, message, time):
    return {"rank": rank, "exit_code": exit_code, "message": message, "traceback": "", "time": time}


def test_a_rank_that_lost_its_peer_is_not_the_cause():
    found = first_failure(
        {
            0: [failure(0, 1, "RuntimeError: Connection closed by peer [127.0.0.1]:1234", 100)],
            1: [failure(1, 1, "ValueError: bad row 17", 100)],
        }
    )
    assert (found.node, found.rank, found.message) == (1, 1, "ValueError: bad row 17")


def test_a_killed_rank_comes_before_those_that_lost_it_and_those_torchrun_ended():
    found = first_failure(
        {
            0: [failure(0, 1, "Connection reset by peer", 99), failure(1, -15, "Signal 15 (SIGTERM)", 98)],
            1: [failure(2, -9, "Signal 9 (SIGKILL) received by PID 7", 101)],
        }
    )
    assert found.rank == 2


def test_no_record_is_no_cause():
    assert first_failure({0: [], 1: []}) is None


@pytest.mark.parametrize(
    ("exit_code", "message", "kind"),
    [
        (1, "ValueError: bad row 17", FailureKind.USER),
        (1, "torch.OutOfMemoryError: CUDA out of memory", FailureKind.USER),
        (1, "torch.distributed.DistBackendError: NCCL error in ProcessGroupNCCL.cpp", FailureKind.TRANSIENT),
        (1, "RuntimeError: Connection reset by peer", FailureKind.TRANSIENT),
        (1, "OSError: [Errno 116] Stale file handle", FailureKind.TRANSIENT),
        (1, "TryAgain: rank 0 ran out of memory. Started again, the run takes 2 at a time", FailureKind.TRANSIENT),
        (1, "HungRank: rank 1 stands still since 10:00:00", FailureKind.TRANSIENT),
        (-9, "Signal 9 (SIGKILL) received by PID 7", FailureKind.TRANSIENT),
        (-15, "Signal 15 (SIGTERM) received by PID 7", FailureKind.TRANSIENT),
        (75, "Process failed with exitcode 75", FailureKind.LOST),
        (3, "Process failed with exitcode 3", FailureKind.USER),
    ],
)
def test_what_a_failure_calls_for(exit_code, message, kind):
    assert first_failure({0: [failure(0, exit_code, message, 1)]}).kind is kind
