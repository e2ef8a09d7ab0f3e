"""Runs one job on this machine to its end: ``python -m tasks.pool.local_runner ATTEMPT_FOLDER LOCK_FILE``.

A process of its own, in its own session, so that the job outlives the flow that submitted it and a restarted flow finds
it again. It waits for its turn at the machine, starts one torchrun agent per emulated node in a process group of its
own, and writes ``exit.json`` last.
"""

import ctypes
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tasks.contracts.files import read_json, write_json
from tasks.contracts.job import JobSpec, JobState
from tasks.pool.attempts import FAILURES, log_paths
from tasks.pool.launch import Rendezvous, agent_command

GRACE_S = 10
"""Between the first node's failure (or the request to stop) and the end of the others: time to write their errors."""
LOOPBACK = "127.0.0.1"


class Stopped(Exception):
    """Someone asked for the job's end."""


def main(argv: list[str]) -> None:
    folder, lock_file = Path(argv[1]), Path(argv[2])
    job = JobSpec(**read_json(folder / "spec.json"))
    signal.signal(signal.SIGTERM, _stop)
    agents: list[subprocess.Popen[bytes]] = []
    try:
        with lock_file.open("w") as lock:
            # Released by the kernel when this process ends, however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX)
            write_json(folder / "started.json", {"time": time.time()})
            agents = _start(job, folder)
            outcome = _wait(job, agents)
    except Stopped:
        outcome = {"state": JobState.CANCELLED.value, "reason": "cancelled"}
    except OSError as error:
        outcome = {"state": JobState.FAILED.value, "reason": f"cannot start: {error}"}
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _end(agents)
    write_json(folder / "exit.json", {**outcome, "exit_codes": [agent.returncode for agent in agents]})


def _stop(signum: int, frame: Any) -> None:
    raise Stopped


def _start(job: JobSpec, folder: Path) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    rendezvous = Rendezvous(LOOPBACK, port, f"{job.name}-{folder.name}")
    agents = []
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
                    env=os.environ | _node_environment(job, node) | dict(job.env),
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
            )
    return agents


def _node_environment(job: JobSpec, node: int) -> dict[str, str]:
    width = job.processes_per_node
    devices = ",".join(str(node * width + i) for i in range(width)) if job.gpus else ""
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


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _wait(job: JobSpec, agents: list[subprocess.Popen[bytes]]) -> dict[str, Any]:
    deadline = time.monotonic() + job.time_limit_s
    while True:
        codes = [agent.poll() for agent in agents]
        failed = [node for node, code in enumerate(codes) if code]
        if failed:
            grace_ends = time.monotonic() + GRACE_S
            while time.monotonic() < grace_ends and any(agent.poll() is None for agent in agents):
                time.sleep(0.1)
            code = codes[failed[0]]
            how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
            return {"state": JobState.FAILED.value, "reason": f"node {failed[0]}'s torchrun agent {how}"}
        if all(code == 0 for code in codes):
            return {"state": JobState.SUCCEEDED.value, "reason": ""}
        if time.monotonic() > deadline:
            reason = f"ran longer than its limit of {job.time_limit_s:.0f} s; raise pool.time_limit_minutes"
            return {"state": JobState.FAILED.value, "reason": reason}
        time.sleep(0.1)


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
