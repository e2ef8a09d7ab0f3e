"""Runs one job on this machine to its end: ``python -m tasks.pool.local_runner ATTEMPT_FOLDER LOCK_FOLDER [--share-gpus]``.

A process of its own, in its own session, so that the job outlives the flow that submitted it and a restarted flow finds
it again. It waits for its turn at the machine, starts one torchrun agent per emulated node in a process group of its
own, and writes ``exit.json`` last.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tasks.contracts.files import write_json
from tasks.contracts.job import LEFT_EXIT_CODE, FailureKind, JobSpec, JobState
from tasks.hardware.gpus import visible_gpus
from tasks.hardware.host import LOOPBACK, end_with_parent, free_port
from tasks.pool.attempts import CANCELLED, WAITS, log_paths, read_spec
from tasks.pool.launch import Rendezvous, agent_command
from tasks.pool.torchrun_files import FAILURES
from tasks.pool.turns import turn_at_gpus, turn_at_processors

GRACE_S = 10
"""Between the first node's failure (or the request to stop) and the end of the others: time to write their errors."""


class Stopped(Exception):
    """Someone asked for the job's end."""


def main(argv: list[str]) -> None:
    folder, lock_folder, share_gpus = Path(argv[1]), Path(argv[2]), "--share-gpus" in argv[3:]
    job = read_spec(folder)
    signal.signal(signal.SIGTERM, _stop)
    agents: list[subprocess.Popen[bytes]] = []
    try:
        with _turn(job, lock_folder, lambda: _tell_of_waiting(folder), share_gpus=share_gpus) as gpus:
            try:
                write_json(folder / "started.json", {"time": time.time(), "gpus": gpus})
                _start(job, folder, gpus, agents)
                outcome = _wait(job, agents)
            except Stopped:
                outcome = CANCELLED
            # The next job's turn comes when nothing of this one runs any more.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            _end(agents)
    except Stopped:
        outcome = CANCELLED
    except (OSError, ValueError) as error:
        _end(agents)
        outcome = _outcome(JobState.FAILED, f"cannot start: {error}", FailureKind.USER)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    write_json(folder / "exit.json", {**outcome, "exit_codes": [agent.returncode for agent in agents]})


@contextmanager
def _turn(job: JobSpec, lock_folder: Path, on_wait: Callable[[], object], *, share_gpus: bool) -> Iterator[list[str]]:
    """This job's turn, with the GPUs that are its own; none for a job on the processors."""
    num_gpus = job.num_nodes * job.processes_per_node
    if not job.gpus:
        with turn_at_processors(lock_folder, on_wait):
            yield []
    elif share_gpus:
        yield visible_gpus()[:num_gpus]
    else:
        with turn_at_gpus(visible_gpus(), num_gpus, on_wait) as gpus:
            yield gpus


def _tell_of_waiting(folder: Path) -> None:
    # A full disk costs the reason, and not the job that only waits.
    with suppress(OSError):
        (folder / WAITS).touch()


def _stop(signum: int, frame: Any) -> None:
    raise Stopped


def _start(job: JobSpec, folder: Path, gpus: Sequence[str], agents: list[subprocess.Popen[bytes]]) -> None:
    """Start one agent per node; each is in ``agents`` as soon as it lives."""
    rendezvous = Rendezvous(LOOPBACK, free_port(), f"{job.name}-{folder.name}")
    command = agent_command(
        job, rendezvous, spec=str(folder / "spec.json"), failures=str(folder / FAILURES), local_addr=LOOPBACK
    )
    for node, log in enumerate(log_paths(job, folder)):
        with log.open("ab") as output:
            agents.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=os.environ | _node_environment(job, node, gpus) | dict(job.env),
                    start_new_session=True,
                    preexec_fn=end_with_parent,
                )
            )


def _node_environment(job: JobSpec, node: int, gpus: Sequence[str]) -> dict[str, str]:
    width = job.processes_per_node
    devices = ",".join(gpus[node * width : (node + 1) * width])
    threads = max(1, (os.cpu_count() or 1) // (job.num_nodes * width))
    # glibc gives large blocks back at every free, and torch on a CPU then pays a page fault for each page of each
    # product again: keeping them saved five sixths of the faults and a tenth of a training step.
    keep_memory = {} if job.gpus else {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
    return keep_memory | {
        "CUDA_VISIBLE_DEVICES": devices,
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo",
        "NODE_RANK": str(node),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _wait(job: JobSpec, agents: list[subprocess.Popen[bytes]]) -> dict[str, Any]:
    deadline = time.monotonic() + job.time_limit_s
    while True:
        codes = [agent.poll() for agent in agents]
        failed = [node for node, code in enumerate(codes) if code]
        if failed:
            grace_ends = time.monotonic() + GRACE_S
            while time.monotonic() < grace_ends and any(agent.poll() is None for agent in agents):
                time.sleep(0.1)
            # The first to leave is not the cause where another failed meanwhile.
            ended = {node: code for node, agent in enumerate(agents) if (code := agent.poll())}
            return _ended_badly(ended if codes[failed[0]] == LEFT_EXIT_CODE else {n: ended[n] for n in failed})
        if all(code == 0 for code in codes):
            return _outcome(JobState.SUCCEEDED, "")
        if time.monotonic() > deadline:
            reason = f"ran longer than its limit of {job.time_limit_s:.0f} s; raise pool.time_limit_minutes"
            return _outcome(JobState.FAILED, reason, FailureKind.USER)
        time.sleep(0.1)


def _ended_badly(codes: dict[int, int]) -> dict[str, Any]:
    """What the nodes' exit codes, without those that ended well or still ran, mean for the job."""
    # A killed agent is an emulated node's death.
    lost = [node for node, code in codes.items() if code < 0]
    if lost:
        reason = f"node {lost[0]} was lost: its torchrun agent was killed by {signal.Signals(-codes[lost[0]]).name}"
        return _outcome(JobState.PREEMPTED, reason, FailureKind.LOST)
    if set(codes.values()) == {LEFT_EXIT_CODE}:
        return _outcome(JobState.PREEMPTED, "the ranks were told to leave, and left", FailureKind.LOST)
    node, code = next((node, code) for node, code in codes.items() if code != LEFT_EXIT_CODE)
    return _outcome(JobState.FAILED, f"node {node}'s torchrun agent ended with exit code {code}")


def _outcome(state: JobState, reason: str, kind: FailureKind | None = None) -> dict[str, Any]:
    return {"state": state.value, "reason": reason, "kind": kind and kind.value}


def _end(agents: list[subprocess.Popen[bytes]]) -> None:
    """Ask the agents to end (they end their ranks), then insist."""
    for agent in agents:
        if agent.poll() is None:
            agent.terminate()
    deadline = time.monotonic() + GRACE_S
    for agent in agents:
        try:
            agent.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            agent.kill()
            agent.wait()


if __name__ == "__main__":
    main(sys.argv)
