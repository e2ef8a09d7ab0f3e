"""The pool that is this machine: emulated nodes, each a torchrun agent with its own process group.

One job at a time has the machine's processors, and one each of its GPUs; others wait their turn. A handle is the attempt's
folder: everything known about the job is read from there, so any process can take over.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tasks.contracts.files import read_json, write_json
from tasks.contracts.job import FailureKind, JobError, JobHandle, JobSpec, JobState, LogLine, PoolError
from tasks.hardware.gpus import visible_gpus
from tasks.pool.attempts import (
    CANCELLED,
    WAITS,
    adopted,
    begin_attempt,
    follow,
    is_ours_to_ask,
    job_error,
    newest_attempt,
    outcome_of,
    read_spec,
    state_left_behind,
    submitting,
)
from tasks.pool.process_identity import identity_of

TOKEN = "PROVING_GROUND_ATTEMPT"  # noqa: S105 - names the variable that marks a job's processes

KILL_LIMIT_S = 60

_started_here: list[subprocess.Popen[bytes]] = []
"""Runners that are this process's children: kept until they have ended, so that none stays a zombie."""


class LocalPool:
    """Jobs on this machine. Implements :class:`tasks.contracts.job.Pool`.

    Args:
        lock_folder: jobs of pools with the same folder take turns at the processors; at GPUs all of the machine do.
        share_gpus: let jobs run on GPUs that other jobs are using.
    """

    def __init__(self, lock_folder: Path, *, share_gpus: bool = False) -> None:
        self._lock_folder = lock_folder
        self._share_gpus = share_gpus

    def submit(self, job: JobSpec) -> JobHandle:
        check_gpus(job)
        folder = Path(job.folder)
        self._lock_folder.mkdir(parents=True, exist_ok=True)
        with submitting(folder):
            newest = newest_attempt(folder)
            if newest is not None and is_ours_to_ask(newest, "local"):
                handle = JobHandle(str(newest))
                if self.state(handle) in (JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED):
                    return adopted(newest, job)
                self.cancel(handle)
            attempt = begin_attempt(job, newest, "local")
            self._start(attempt)
            return JobHandle(str(attempt))

    def _start(self, attempt: Path) -> None:
        token = uuid.uuid4().hex
        # The record comes first: whatever happens next, the processes can be found by their token.
        write_json(attempt / "handle.json", {"token": token, "pid": None, "process": None})
        command = [sys.executable, "-m", "tasks.pool.local_runner", str(attempt), str(self._lock_folder)]
        with (attempt / "runner.log").open("ab") as log:
            runner = subprocess.Popen(
                [*command, *(["--share-gpus"] if self._share_gpus else [])],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {TOKEN: token},
                start_new_session=True,
            )
        _started_here.append(runner)
        # None if it has ended already: then what it left is its end.
        identity = identity_of(runner.pid)
        write_json(attempt / "handle.json", {"token": token, "pid": runner.pid, "process": identity})

    def state(self, job: JobHandle) -> JobState:
        attempt = Path(job)
        _started_here[:] = [runner for runner in _started_here if runner.poll() is None]
        if not (attempt / "spec.json").exists():
            return JobState.UNKNOWN
        # Order matters: a runner that ends between two looks has written exit.json before.
        alive = _runner(attempt) is not None
        if (ended := state_left_behind(attempt)) is not None:
            return ended
        if not alive:
            return JobState.FAILED
        return JobState.RUNNING if (attempt / "started.json").exists() else JobState.QUEUED

    def explain(self, job: JobHandle) -> str | None:
        # Until it has looked for its turn it waits for nobody: it starts.
        if self.state(job) is not JobState.QUEUED or not (Path(job) / WAITS).exists():
            return None
        return "other jobs have the GPUs" if read_spec(Path(job)).gpus else "another job has this machine"

    def logs(self, job: JobHandle) -> Iterator[LogLine | None]:
        yield from follow(Path(job), lambda: self.state(job).is_final)

    def error(self, job: JobHandle) -> JobError | None:
        attempt = Path(job)
        state = self.state(job)
        if state in (JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED):
            return None
        outcome = outcome_of(attempt)
        if not outcome:
            # Its ranks went with it, and what they left of their end is no cause.
            return job_error(attempt, f"the job's runner vanished; see {attempt / 'runner.log'}", FailureKind.TRANSIENT)
        if outcome["state"] == JobState.SUCCEEDED.value:
            return job_error(attempt, "all ranks ended well but none left a result")
        kind = outcome.get("kind")
        return job_error(attempt, outcome["reason"], kind and FailureKind(kind))

    def cancel(self, job: JobHandle) -> None:
        attempt = Path(job)
        if not (attempt / "handle.json").exists():
            return
        was_final = self.state(job).is_final
        runner = _runner(attempt)
        if runner is not None:
            # It may end between the look and the signal.
            with suppress(psutil.NoSuchProcess):
                runner.send_signal(signal.SIGTERM)
                try:
                    runner.wait(25)
                except psutil.TimeoutExpired:
                    runner.kill()
        # Ranks have sessions of their own, and a killed agent does not take them along: find them by the token.
        token = read_json(attempt / "handle.json")["token"]
        deadline = time.monotonic() + KILL_LIMIT_S
        while remaining := _processes_with(token):
            if time.monotonic() > deadline:
                told = ", ".join(str(p.pid) for p in remaining)
                raise PoolError(
                    f"processes {told} of {attempt} still live {KILL_LIMIT_S} s after they were killed; one that waits "
                    "for a disk or a GPU (disk-sleep) ends when that answers, or with the machine"
                )
            for process in remaining:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(remaining, timeout=5)
        if not was_final and not (attempt / "exit.json").exists():
            write_json(attempt / "exit.json", CANCELLED | {"exit_codes": []})


def check_gpus(job: JobSpec) -> None:
    """Raise ValueError if the job wants more GPUs than this machine shows."""
    if not job.gpus:
        return
    available = len(visible_gpus())
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
    if record["process"] is None or identity_of(record["pid"]) != record["process"]:
        return None
    try:
        return psutil.Process(record["pid"])
    except psutil.NoSuchProcess:
        return None


def _processes_with(token: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(TOKEN) == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
