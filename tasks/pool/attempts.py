"""What pools share whose attempts are folders on storage that every node sees: who is newest, logs, and why it failed."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from tasks.contracts.attempt import BEGUN
from tasks.contracts.files import only_one, read_json, write_json, write_text
from tasks.contracts.job import FailureKind, JobError, JobHandle, JobSpec, JobState, LogLine
from tasks.contracts.pool_settings import Backend
from tasks.pool.failures import first_failure
from tasks.pool.torchrun_files import FAILURES, HOST

CANCELLED = {"state": JobState.CANCELLED.value, "reason": "cancelled", "kind": FailureKind.USER.value}
"""The outcome of a job that somebody ended on purpose."""
WAITS = "waits"
"""File of a local job's attempt: another job had what it needs when its turn would have been."""
INPUTS = ("dataset", "adapter", "output")
"""The arguments that are what other stages made, and where this one's result lies. Settings are bound to a run before."""
NUM_LAST_LINES = 15
POLL_S = 0.25


def submitting(folder: Path) -> AbstractContextManager[None]:
    """One at a time: two flows that submit one name at the same moment get one job."""
    return only_one(folder / ".submit.lock")


def newest_attempt(folder: Path) -> Path | None:
    """The newest attempt at a job, whatever became of it."""
    attempts = [path for path in folder.iterdir() if path.name.isdigit() and (path / "spec.json").exists()]
    return max(attempts, key=lambda path: int(path.name), default=None)


def backend_of(attempt: Path) -> Backend | None:
    """Which pool an attempt was submitted to; None where none was (a spec written to be run by hand)."""
    path = attempt / "backend"
    return cast(Backend, path.read_text().strip()) if path.exists() else None


def is_ours_to_ask(attempt: Path, backend: Backend) -> bool:
    """Whether ``backend`` can say what became of the attempt; of one that it did not make it only knows a result.

    Raises:
        ValueError: another backend made it, and it may still run there.
    """
    maker = backend_of(attempt)
    if maker in (None, backend):
        return True
    ended = state_left_behind(attempt)
    if ended is None:
        name = "/".join((attempt.parents[2].name, *attempt.parts[-2:]))
        raise ValueError(
            f"{name} was submitted to {maker} and may still run there; go on with pool.backend={maker}, end it first "
            f"(python -m tasks.pool cancel {name.rpartition('/')[0]}), or give another --run"
        )
    return ended is JobState.SUCCEEDED


def adopted(newest: Path, job: JobSpec) -> JobHandle:
    """The handle of an attempt that runs or has ended well, for a job of the same inputs.

    Raises:
        ValueError: its result was made of other inputs or lies elsewhere, as after a change of the project's code or folders.
    """
    if state_left_behind(newest) is JobState.SUCCEEDED:
        begun: dict[str, Any] = read_json(newest / "spec.json")["arguments"]
        for name in INPUTS:
            if begun.get(name) != job.arguments.get(name):
                raise ValueError(
                    f"{newest} was made with {name}={begun.get(name)}, now it is {job.arguments.get(name)}: the project's code "
                    "or its folders have changed since this run began, and its results do not go together; give another --run"
                )
    return JobHandle(str(newest))


def begin_attempt(job: JobSpec, after: Path | None, backend: Backend | None) -> Path:
    """The folder of a new attempt, whose ranks alone may write results from now on.

    Args:
        backend: which pool it is submitted to; None: it is run by hand.
    """
    folder = Path(job.folder)
    attempt = folder / f"{int(after.name) + 1 if after else 1:03d}"
    # One without a spec is the rest of a submission that died in between.
    attempt.mkdir(exist_ok=True)
    if backend is not None:
        write_text(attempt / "backend", backend)
    write_json(attempt / "spec.json", asdict(job))
    write_text(folder / "NEWEST", attempt.name)
    return attempt


def read_spec(attempt: Path) -> JobSpec:
    """The job of an attempt."""
    values = read_json(attempt / "spec.json")
    return JobSpec(**values | {"fallback_num_nodes": tuple(values["fallback_num_nodes"])})


def outcome_of(attempt: Path) -> dict[str, Any]:
    """What the job itself, or who ended it, wrote last: ``state``, ``reason``, perhaps ``kind``; empty if nothing."""
    path = attempt / "exit.json"
    outcome: dict[str, Any] = read_json(path) if path.exists() else {}
    return outcome


def state_left_behind(attempt: Path) -> JobState | None:
    """The end that the job itself wrote, or None; a success without a result is none."""
    outcome = outcome_of(attempt)
    if not outcome:
        return None
    state = JobState(outcome["state"])
    return JobState.FAILED if state is JobState.SUCCEEDED and not (attempt / "result.json").exists() else state


def log_paths(job: JobSpec, attempt: Path) -> list[Path]:
    """Where each node's log lies, linked from the attempt's folder where logs have a root of their own."""
    folder = Path(job.log_folder) / attempt.name if job.log_folder else attempt
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"node-{node}.log" for node in range(job.num_nodes)]
    if folder != attempt:
        for path in paths:
            link = attempt / path.name
            if not link.is_symlink():
                link.symlink_to(path)
    return paths


def follow(attempt: Path, is_final: Callable[[], bool], *, ask_every_s: float = 0.0) -> Iterator[LogLine | None]:
    """Every node's lines, live, from the first one; None while there is nothing new; ends after the last.

    Args:
        ask_every_s: no more often is ``is_final`` called: a scheduler is everybody's, and the files are read more often.
    """
    num_nodes = read_json(attempt / "spec.json")["num_nodes"]
    positions = [0] * num_nodes
    asked, ends = float("-inf"), False
    while True:
        # Asked before reading: what a job writes before it ends is then surely read.
        if time.monotonic() - asked >= ask_every_s:
            asked, ends = time.monotonic(), is_final()
        for node in range(num_nodes):
            path = attempt / f"node-{node}.log"
            if path.exists():
                lines, positions[node] = _read_lines(path, positions[node], to_end=ends)
                yield from (LogLine(node, line) for line in lines)
        if ends:
            return
        yield None
        time.sleep(POLL_S)


def job_error(attempt: Path, reason: str, kind: FailureKind | None = None) -> JobError:
    """Why an attempt failed, with the last lines of every node.

    Args:
        reason: what the scheduler, or who watched the job, says.
        kind: where that decides, whatever ranks and their peers made of it (a lost node, a time limit); None: the first
            failing rank's own error is the cause, and the reason stands only where no rank recorded one.
    """
    num_nodes = read_json(attempt / "spec.json")["num_nodes"]
    last_lines = tuple(
        LogLine(node, line) for node in range(num_nodes) for line in _tail(attempt / f"node-{node}.log")
    )  # fmt: skip
    failure = None if kind else first_failure({node: failures_of(attempt, node) for node in range(num_nodes)})
    if failure is None:
        return JobError(reason, last_lines=last_lines, kind=kind or FailureKind.USER)
    return JobError(
        summary=f"rank {failure.rank} (node {failure.node}): {failure.message}",
        rank=failure.rank,
        node=failure.node,
        traceback=failure.traceback,
        last_lines=last_lines,
        kind=failure.kind,
    )


def nodes_that_never_came(attempt: Path, num_nodes: int) -> list[int]:
    """The nodes whose agent never started; none once all ranks have met."""
    if (attempt / BEGUN).exists():
        return []
    return [node for node in range(num_nodes) if not (attempt / HOST.format(node=node)).exists()]


def _read_lines(path: Path, position: int, *, to_end: bool) -> tuple[list[str], int]:
    """Whole lines after ``position``; a line still being written waits for its end unless ``to_end``."""
    with path.open("rb") as file:
        file.seek(position)
        data = file.read()
    end = len(data) if to_end else data.rfind(b"\n") + 1
    return data[:end].decode("utf-8", errors="replace").splitlines(), position + end


def _tail(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-NUM_LAST_LINES:] if path.exists() else []


def failures_of(attempt: Path, node: int) -> list[dict[str, Any]]:
    """What torchrun recorded of the ranks of one node that failed."""
    path = attempt / FAILURES.format(node=node)
    failures: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return failures
