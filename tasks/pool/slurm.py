"""The pool that is a Slurm cluster: one batch job per attempt, found again by its number, its comment, or what it left.

State is asked of squeue first, then of sacct where there is accounting, then of the files that the job writes last. A
controller that cannot be reached is UNKNOWN, which is neither success nor failure: it comes back.
"""

import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from tasks.contracts.files import read_json, write_json, write_text
from tasks.contracts.job import (
    FailureKind,
    JobError,
    JobHandle,
    JobSpec,
    JobState,
    LogLine,
    MayStillRun,
    PoolError,
    SchedulerAway,
)
from tasks.contracts.pool_settings import NetworkProfile, SlurmSettings
from tasks.pool.attempts import (
    CANCELLED,
    adopted,
    begin_attempt,
    follow,
    is_ours_to_ask,
    job_error,
    log_paths,
    newest_attempt,
    outcome_of,
    read_spec,
    state_left_behind,
    submitting,
)
from tasks.pool.slurm_commands import slurm
from tasks.pool.slurm_script import comment, sbatch_script

CANCEL_LIMIT_S = 120
POLL_S = 1.0
STORAGE_LAG_S = 60
"""Longer than the attribute cache of NFS keeps (acdirmax)."""

_QUEUED = {"PENDING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "STOPPED"}
_RUNNING = {"RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "RESIZING"}
_LOST = {"PREEMPTED", "NODE_FAIL"}
_CANCELLED = {"CANCELLED", "REVOKED"}
_LIMITS = {"TIMEOUT", "OUT_OF_MEMORY", "DEADLINE"}
_FAILED = {"FAILED", "BOOT_FAIL"} | _LIMITS


class SlurmPool:
    """Jobs on Slurm. Implements :class:`tasks.contracts.job.Pool`; the handle is the attempt's folder."""

    def __init__(self, settings: SlurmSettings, network: NetworkProfile = "auto") -> None:
        self._settings = settings
        self._network = network
        self._completed: dict[JobHandle, float] = {}

    def submit(self, job: JobSpec) -> JobHandle:
        folder = Path(job.folder)
        with submitting(folder):
            newest = newest_attempt(folder)
            if newest is not None and is_ours_to_ask(newest, "slurm"):
                handle = JobHandle(str(newest))
                state = self.state(handle)
                if state is JobState.UNKNOWN:
                    raise MayStillRun(f"job {job.name}: {newest} may still run and {self._why_unknown(newest)}")
                if state in (JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED):
                    return adopted(newest, job)
                self.cancel(handle)
            attempt = begin_attempt(job, newest, "slurm")
            log_paths(job, attempt)
            script = attempt / "job.sbatch"
            # On disk before anything is submitted: whatever happens then, the job can be found by it.
            token = uuid.uuid4().hex[:12]
            write_text(attempt / "token", token)
            write_text(script, sbatch_script(job, attempt, token, self._settings, self._network))
            try:
                number = slurm("sbatch", "--parsable", str(script)).split(";")[0].strip()
            except SchedulerAway:
                # It may have been accepted all the same: the next submission looks for it by its comment.
                raise
            except PoolError as error:
                write_json(attempt / "exit.json", {"state": JobState.FAILED.value, "reason": str(error)})
                raise
            write_json(attempt / "handle.json", {"slurm_job_id": number})
            return JobHandle(str(attempt))

    def state(self, job: JobHandle) -> JobState:
        attempt = Path(job)
        if (ended := state_left_behind(attempt)) is JobState.SUCCEEDED:
            return ended
        try:
            number = self._number(attempt)
            told = None if number is None else _state_of(number)
        except PoolError:
            return JobState.UNKNOWN
        if told is None:
            # Slurm has forgotten it, or never had it: what it left decides, and nothing left is no success.
            return ended or JobState.FAILED
        if told in _QUEUED or (told in _LOST and self._settings.requeue and _is_queued(str(number))):
            return JobState.QUEUED
        if told in _RUNNING:
            return JobState.RUNNING
        if told == "COMPLETED":
            # Shared storage may show what a node wrote only after a while: until then nothing is said to have failed.
            seen = self._completed.setdefault(job, time.monotonic())
            is_late = time.monotonic() - seen > STORAGE_LAG_S
            return ended or (JobState.FAILED if is_late else JobState.RUNNING)
        if told in _FAILED and ended is JobState.PREEMPTED:
            # Told to leave, and left: Slurm only sees an exit code.
            return ended
        for states, state in (
            (_LOST, JobState.PREEMPTED),
            (_CANCELLED, JobState.CANCELLED),
            (_FAILED, JobState.FAILED),
        ):
            if told in states:
                return state
        return JobState.UNKNOWN

    def explain(self, job: JobHandle) -> str | None:
        try:
            number = self._number(Path(job))
            if number is None:
                return None
            lines = slurm("squeue", "--noheader", "--jobs", number, "--format=%T %r").split("\n")
        except PoolError as error:
            return str(error)
        state, _, reason = lines[0].partition(" ")
        return reason if state == "PENDING" and reason not in ("", "None") else None

    def logs(self, job: JobHandle) -> Iterator[LogLine | None]:
        yield from follow(Path(job), lambda: self.state(job).is_final, ask_every_s=POLL_S)

    def error(self, job: JobHandle) -> JobError | None:
        attempt = Path(job)
        state = self.state(job)
        if not state.is_final or state is JobState.SUCCEEDED:
            return None
        if state is JobState.PREEMPTED:
            return job_error(attempt, self._reason(attempt), FailureKind.LOST)
        told = self._told(attempt)
        if state is JobState.CANCELLED or told in _LIMITS:
            return job_error(attempt, self._reason(attempt), FailureKind.USER)
        if told is None and not outcome_of(attempt):
            # Nobody's error: Slurm has forgotten a job that left nothing.
            return job_error(attempt, self._reason(attempt), FailureKind.TRANSIENT)
        return job_error(attempt, self._reason(attempt))

    def cancel(self, job: JobHandle) -> None:
        attempt = Path(job)
        number = self._number(attempt)
        if number is None:
            return
        ended = self.state(job)
        reason = self._reason(attempt) if ended.is_final else ""
        deadline = time.monotonic() + CANCEL_LIMIT_S
        while (told := _state_of(number)) is not None and (told in _QUEUED or told in _RUNNING or _is_queued(number)):
            if time.monotonic() > deadline:
                raise PoolError(f"Slurm's job {number} is still {told} {CANCEL_LIMIT_S} s after scancel")
            slurm("scancel", "--quiet", number)
            time.sleep(POLL_S)
        if state_left_behind(attempt) is None:
            # What ended by itself keeps its end, also when Slurm has forgotten it.
            own_end = {"state": ended.value, "reason": reason}
            write_json(attempt / "exit.json", own_end if ended.is_final else CANCELLED)

    def _number(self, attempt: Path) -> str | None:
        """Slurm's number of the attempt; None if it was never submitted."""
        path = attempt / "handle.json"
        if path.exists():
            return str(read_json(path)["slurm_job_id"])
        if not (attempt / "job.sbatch").exists():
            return None
        # Whoever submitted it died before the number was written: the comment tells which job it is.
        wanted = comment(read_spec(attempt), attempt, (attempt / "token").read_text())
        for line in slurm("squeue", "--noheader", "--states=all", "--me", "--format=%i %k").splitlines():
            number, _, text = line.strip().partition(" ")
            if text == wanted:
                write_json(path, {"slurm_job_id": number})
                return number
        return None

    def _told(self, attempt: Path) -> str | None:
        """What Slurm calls its state; None where it knows no such job, or cannot be asked."""
        try:
            number = self._number(attempt)
            return None if number is None else _state_of(number)
        except PoolError:
            return None

    def _reason(self, attempt: Path) -> str:
        """Why a job without an error of its own ended."""
        if reason := outcome_of(attempt).get("reason"):
            return str(reason)
        try:
            number = self._number(attempt)
            told = None if number is None else _state_of(number)
        except PoolError as error:
            return f"the job ended, and Slurm cannot be asked how: {error}"
        log = attempt / "slurm.log"
        last = [line for line in (log.read_text(errors="replace").splitlines() if log.exists() else []) if line.strip()]
        words = f": {last[-1]}" if last else ""
        if told is None:
            return f"Slurm's job {number} is gone and left no result{words}; see {log}"
        return f"Slurm's job {number} ended as {told}{words}; see {log}"

    def _why_unknown(self, attempt: Path) -> str:
        try:
            number = self._number(attempt)
            return (
                f"Slurm calls job {number} {None if number is None else _state_of(number)!r}, which is not known here"
            )
        except PoolError as error:
            return str(error)


def _state_of(number: str) -> str | None:
    """What Slurm calls the job's state; None if it knows no such job any more."""
    try:
        told = slurm("squeue", "--noheader", "--states=all", "--jobs", number, "--format=%T").split()
    except PoolError as error:
        if "Invalid job id" not in str(error):
            raise
        told = []
    if told:
        return told[0]
    try:
        accounted = slurm("sacct", "--noheader", "--allocations", "--parsable2", "--jobs", number, "--format=State")
    except PoolError as error:
        # Many clusters keep no accounts; then the files that the job left decide.
        if "accounting storage is disabled" in str(error).lower() or "not found" in str(error):
            return None
        raise
    # "CANCELLED by 1000": the first word is the state.
    words = accounted.split()
    return words[0] if words else None


def _is_queued(number: str) -> bool:
    try:
        return bool(slurm("squeue", "--noheader", "--jobs", number, "--format=%T").split())
    except PoolError as error:
        if "Invalid job id" in str(error):
            return False
        raise
