"""The pool that is this machine: emulated nodes, each a torchrun agent with its own process group.

One job at a time has the machine; others of the same storage folder wait their turn (a file lock). A handle is the
attempt's folder: everything known about the job is read from there, so any process can take over.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tasks.contracts.files import read_json, write_json
from tasks.contracts.job import JobError, JobHandle, JobSpec, JobState, LogLine
from tasks.pool.attempts import begin_attempt, follow, job_error, newest_attempt, submitting

TOKEN = "PROVING_GROUND_ATTEMPT"  # noqa: S105 - names the variable that marks a job's processes

_started_here: list[subprocess.Popen[bytes]] = []
"""Runners that are this process's children: kept until they have ended, so that none stays a zombie."""


class LocalPool:
    """Jobs on this machine. Implements :class:`tasks.contracts.job.Pool`.

    Args:
        lock_folder: jobs of pools with the same folder take turns at the machine.
    """

    def __init__(self, lock_folder: Path) -> None:
        self._lock_folder = lock_folder

    def submit(self, job: JobSpec) -> JobHandle:
        check_gpus(job)
        folder = Path(job.folder)
        self._lock_folder.mkdir(parents=True, exist_ok=True)
        with submitting(folder):
            newest = newest_attempt(folder)
            if newest is not None:
                handle = JobHandle(str(newest))
                if self.state(handle) in (JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED):
                    return handle
                self.cancel(handle)
            attempt = begin_attempt(job, newest)
            self._start(attempt)
            return JobHandle(str(attempt))

    def _start(self, attempt: Path) -> None:
        token = uuid.uuid4().hex
        # The record comes first: whatever happens next, the processes can be found by their token.
        write_json(attempt / "handle.json", {"token": token, "pid": None, "create_time": None})
        with (attempt / "runner.log").open("ab") as log:
            runner = subprocess.Popen(
                [sys.executable, "-m", "tasks.pool.local_runner", str(attempt), str(self._lock_folder / "local.lock")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {TOKEN: token},
                start_new_session=True,
            )
        _started_here.append(runner)
        create_time = psutil.Process(runner.pid).create_time()
        write_json(attempt / "handle.json", {"token": token, "pid": runner.pid, "create_time": create_time})

    def state(self, job: JobHandle) -> JobState:
        attempt = Path(job)
        _started_here[:] = [runner for runner in _started_here if runner.poll() is None]
        if not (attempt / "spec.json").exists():
            return JobState.UNKNOWN
        # Order matters: a runner that ends between two looks has written exit.json before.
        alive = _runner(attempt) is not None
        if (attempt / "exit.json").exists():
            state = JobState(read_json(attempt / "exit.json")["state"])
            if state is JobState.SUCCEEDED and not (attempt / "result.json").exists():
                return JobState.FAILED
            return state
        if not alive:
            return JobState.FAILED
        return JobState.RUNNING if (attempt / "started.json").exists() else JobState.QUEUED

    def explain(self, job: JobHandle) -> str | None:
        return "another job has this machine" if self.state(job) is JobState.QUEUED else None

    def logs(self, job: JobHandle) -> Iterator[LogLine | None]:
        yield from follow(Path(job), lambda: self.state(job).is_final)

    def error(self, job: JobHandle) -> JobError | None:
        attempt = Path(job)
        state = self.state(job)
        if state in (JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED):
            return None
        exit_file = attempt / "exit.json"
        if not exit_file.exists():
            error = job_error(attempt, "")
            return JobError(f"the job's runner vanished; see {attempt / 'runner.log'}", last_lines=error.last_lines)
        outcome = read_json(exit_file)
        if outcome["state"] == JobState.SUCCEEDED.value:
            return job_error(attempt, "all ranks ended well but none left a result")
        return job_error(attempt, outcome["reason"])

    def cancel(self, job: JobHandle) -> None:
        attempt = Path(job)
        if not (attempt / "handle.json").exists():
            return
        was_final = self.state(job).is_final
        runner = _runner(attempt)
        if runner is not None:
            runner.send_signal(signal.SIGTERM)
            try:
                runner.wait(25)
            except psutil.TimeoutExpired:
                runner.kill()
        # Ranks have sessions of their own, and a killed agent does not take them along: find them by the token.
        token = read_json(attempt / "handle.json")["token"]
        while remaining := _processes_with(token):
            for process in remaining:
                process.kill()
            psutil.wait_procs(remaining, timeout=5)
        if not was_final and not (attempt / "exit.json").exists():
            write_json(attempt / "exit.json", {"state": "cancelled", "reason": "cancelled", "exit_codes": []})


def check_gpus(job: JobSpec) -> None:
    """Raise ValueError if the job wants more GPUs than this machine shows."""
    if not job.gpus:
        return
    # Asked through the driver's library: the flow's process must not import torch.
    import pynvml

    try:
        pynvml.nvmlInit()
        available = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        available = 0
    wanted = job.num_nodes * job.processes_per_node
    if wanted > available:
        raise ValueError(
            f"{job.num_nodes} nodes x {job.processes_per_node} processes need {wanted} GPUs and this machine shows "
            f"{available}; lower pool.num_nodes or pool.processes_per_node, or set pool.gpus=false to use the CPU"
        )


def _runner(attempt: Path) -> psutil.Process | None:
    """The living runner of an attempt; a recycled process id is not it."""
    path = attempt / "handle.json"
    record: dict[str, Any] = read_json(path) if path.exists() else {}
    if record.get("pid") is None:
        found = [p for p in _processes_with(record.get("token", "-")) if "tasks.pool.local_runner" in p.cmdline()]
        return found[0] if found else None
    try:
        process = psutil.Process(record["pid"])
        is_same = process.create_time() == record["create_time"] and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process if is_same else None


def _processes_with(token: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(TOKEN) == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
