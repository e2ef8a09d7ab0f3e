"""One stage of a run as Prefect and MLflow see it: a job of the pool with its log, progress, child run and outcome."""

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import TerminationSignal
from prefect.logging import get_run_logger

from tasks.contracts.attempt import Progress
from tasks.contracts.files import link
from tasks.contracts.job import JobFailed, JobHandle, JobSpec, JobState, LogLine
from tasks.pool.supervise import Interrupted, Watch, supervise
from tasks.run import Run
from tasks.tracking.mlflow_runs import Status

OUR_PACKAGE = str(Path(__file__).resolve().parents[1])


@dataclass(frozen=True)
class StageResult:
    """What a stage's job left, and its run in MLflow."""

    result: Mapping[str, Any]
    mlflow_run_id: str


def stage_job(
    run: Run, stage: str, module: str, arguments: Mapping[str, Any], *, is_wide: bool
) -> JobSpec:  # fmt: skip
    """The job of a stage: over the whole pool, or one CPU process where ``is_wide`` is off."""
    pool, storage = run.experiment.pool, run.experiment.storage
    env = {
        # Ranks run wherever the pool starts them; our code is where this file is.
        "PYTHONPATH": os.pathsep.join(filter(None, [OUR_PACKAGE, os.environ.get("PYTHONPATH", "")])),
    }
    if storage.scratch:
        env["TMPDIR"] = storage.scratch
    return JobSpec(
        name=f"{run.folder.run}-{stage}".replace("_", "-").lower(),
        module=module,
        arguments=dict(arguments),
        folder=str(run.folder.job(stage)),
        log_folder=run.folder.job_logs(stage),
        num_nodes=pool.num_nodes if is_wide else 1,
        min_num_nodes=pool.num_nodes if is_wide else 1,
        processes_per_node=pool.processes_per_node if is_wide else 1,
        gpus=pool.gpus and is_wide,
        env=env,
        time_limit_s=pool.time_limit_minutes * 60,
        queue_limit_s=None if pool.queue_limit_minutes is None else pool.queue_limit_minutes * 60,
    )


def run_stage(run: Run, stage: str, job: JobSpec) -> StageResult:
    """Bring the stage's job to its end.

    Raises:
        JobFailed: with the failing rank's own error; the child run says FAILED.
        Interrupted: the run was asked to stop; the child run says KILLED.
    """
    logger = get_run_logger()
    progress = _ProgressArtifact(stage)
    handles: list[JobHandle] = []

    def on_line(line: LogLine) -> None:
        if line.text.strip():
            logger.info("%s node %d | %s", stage, line.node, line.text)

    def on_state(state: JobState) -> None:
        logger.info("%s: job %s is %s", stage, job.name, state.value)

    with child_run(run, stage) as child:
        result = supervise(
            run.pool,
            job,
            Watch(
                on_submit=handles.append,
                on_state=on_state,
                on_waiting=lambda reason: logger.info("%s: job %s waits: %s", stage, job.name, reason),
                on_line=on_line,
                on_progress=progress.update,
                on_metrics=lambda step, at, metrics: run.tracking.log_point(child, step, at, metrics),
                should_stop=run.stop.is_set,
            ),
        )
        seconds = result["finished"] - result["started"]
        run.tracking.log_metrics(child, {"stage/seconds": seconds})
        progress.finish()
    return StageResult(result, child)


@contextmanager
def child_run(run: Run, stage: str, tags: Mapping[str, str] | None = None) -> Iterator[str]:
    """A child run in MLflow whose status is what really happened inside the block."""
    child = run.tracking.start_child(run.mlflow_run_id, stage, tags or {})
    try:
        yield child
    except (Interrupted, KeyboardInterrupt, TerminationSignal):
        _end_badly(run, child, "KILLED")
        raise
    except JobFailed as error:
        _end_badly(run, child, "FAILED", str(error), sorted(run.folder.job(stage).glob("*/node-*.log")))
        raise
    except BaseException as error:
        _end_badly(run, child, "FAILED", f"{type(error).__name__}: {error}")
        raise
    run.tracking.end(child, "FINISHED")


def _end_badly(run: Run, child: str, status: Status, error: str = "", logs: Sequence[Path] = ()) -> None:
    with cause_first(status):
        run.tracking.end(child, status)
        if error:
            run.tracking.client.set_tag(child, "error", error[:5000])
        run.tracking.log_files(child, logs, "logs")


@contextmanager
def cause_first(status: Status) -> Iterator[None]:
    """Around telling MLflow of a bad end: an MLflow that cannot be told must not take the place of what went wrong."""
    try:
        yield
    except Exception as untold:
        get_run_logger().error("MLflow could not be told of the end %s and may still show RUNNING: %s", status, untold)


def keep(run: Run, at: Path, kind: str, digest: str | None) -> tuple[Path, bool]:
    """Where a deterministic result lies, and whether it is there already.

    With a digest the result is shared between runs: it lies in the cache, and the run's folder links to it.
    """
    if digest is None:
        return at, (at / "manifest.json").exists()
    cached = run.folder.cache / kind / digest[:32]
    link(at, cached)
    return cached, (cached / "manifest.json").exists()


class _ProgressArtifact:
    """A progress bar in the Prefect UI, created with the first progress and updated at most once a second."""

    def __init__(self, stage: str) -> None:
        self._key = re.sub(r"[^a-z0-9-]", "-", stage.lower())
        self._id: UUID | None = None
        self._updated = 0.0

    def update(self, progress: Progress) -> None:
        share = 100 * progress.done / max(1, progress.total)
        text = f"{self._key}: {progress.done} of {progress.total} {progress.unit}"
        if self._id is None:
            self._id = _uuid(create_progress_artifact(share, key=self._key, description=text))
        elif time.monotonic() - self._updated >= 1:
            update_progress_artifact(self._id, share, description=text)
        else:
            return
        self._updated = time.monotonic()

    def finish(self) -> None:
        if self._id is not None:
            update_progress_artifact(self._id, 100.0, description=f"{self._key}: done")


def _uuid(value: Any) -> UUID:
    return value if isinstance(value, UUID) else UUID(str(value))
