"""One stage of a run as Prefect and MLflow see it: a job of the pool with its log, progress, child run and outcome."""

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
from tasks.contracts.job import JobFailed, JobSpec, JobState, LogLine
from tasks.pool.retry import Retries, run_to_end
from tasks.pool.supervise import Interrupted, Watch
from tasks.run import Driven, Run
from tasks.tracking.mlflow_runs import Status


@dataclass(frozen=True)
class StageResult:
    """What a stage's job left, and its run in MLflow."""

    result: Mapping[str, Any]
    mlflow_run_id: str


def run_stage(run: Driven, stage: str, job: JobSpec) -> StageResult:
    """Bring the stage's job to its end, with a child run in MLflow for each attempt.

    Raises:
        JobFailed: with the failing rank's own error; the child run says FAILED.
        Interrupted: the run was asked to stop; the child run says KILLED.
    """
    logger = get_run_logger()
    progress = _ProgressArtifact(stage)
    children: list[str] = []

    def on_line(line: LogLine) -> None:
        if line.text.strip():
            logger.info("%s node %d | %s", stage, line.node, line.text)

    def on_state(state: JobState) -> None:
        logger.info("%s: job %s is %s", stage, job.name, state.value)
        try:
            progress.show_state(state)
        except Exception as error:
            # A Prefect server that is away has no say in the job.
            logger.error("%s: its progress cannot be shown for now: %s", stage, error)

    @contextmanager
    def attempt() -> Iterator[Watch]:
        with child_run(run, stage) as child:
            children.append(child)
            yield Watch(
                on_state=on_state,
                on_waiting=lambda reason: logger.info("%s: job %s waits: %s", stage, job.name, reason),
                on_line=on_line,
                on_progress=progress.update,
                on_metrics=lambda step, at, metrics: run.tracking.log_point(child, step, at, metrics),
                on_untold=lambda error: logger.error(
                    "%s: progress and metrics cannot be recorded for now, the job goes on: %s", stage, error
                ),
                should_stop=run.stop.is_set,
            )

    def pause(seconds: float) -> None:
        if run.stop.wait(seconds):
            raise Interrupted(f"job {job.name} stopped on request")

    result = run_to_end(
        run.pool,
        job,
        Retries(run.max_retries),
        attempt=attempt,
        on_again=lambda failed, again: logger.warning("%s: %s. %s", stage, again.why, failed),
        on_away=lambda away: logger.warning("%s: waiting for the scheduler: %s", stage, away),
        pause=pause,
    )
    with cause_first("FINISHED"):
        run.tracking.log_metrics(children[-1], {"stage/seconds": result["finished"] - result["started"]})
        progress.finish()
    return StageResult(result, children[-1])


@contextmanager
def child_run(run: Driven, stage: str, tags: Mapping[str, str] | None = None) -> Iterator[str]:
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
    # What has ended well stays so: other stages' jobs are not ended because a server is away. The run's own end tells again.
    with cause_first("FINISHED"):
        run.tracking.end(child, "FINISHED")


def _end_badly(run: Driven, child: str, status: Status, error: str = "", logs: Sequence[Path] = ()) -> None:
    with cause_first(status):
        run.tracking.end(child, status)
        if error:
            run.tracking.client.set_tag(child, "error", error[:5000])
        run.tracking.log_files(child, logs, "logs")


@contextmanager
def cause_first(status: Status) -> Iterator[None]:
    """Around telling the servers of an end: one that cannot be told must not take the place of what really happened."""
    try:
        yield
    except Exception as untold:
        get_run_logger().error("the end %s could not be told and may still be shown as running: %s", status, untold)


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
    """A progress bar in the Prefect UI, created with the job's first state; its progress at most once a second."""

    def __init__(self, stage: str) -> None:
        self._key = re.sub(r"[^a-z0-9-]", "-", stage.lower())
        self._id: UUID | None = None
        self._share = 0.0
        self._updated = 0.0

    def update(self, progress: Progress) -> None:
        """How far the job is; often enough to look at, not at every step."""
        self._share = 100 * progress.done / max(1, progress.total)
        if time.monotonic() - self._updated >= 1:
            self._show(f"{progress.done} of {progress.total} {progress.unit}")

    def show_state(self, state: JobState) -> None:
        """Where the job stands; before its first progress, and when it has to start over."""
        self._show(state.value)

    def finish(self) -> None:
        self._share = 100.0
        self._show("done")

    def _show(self, what: str) -> None:
        text = f"{self._key}: {what}"
        if self._id is None:
            self._id = _uuid(create_progress_artifact(self._share, key=self._key, description=text))
        else:
            update_progress_artifact(self._id, self._share, description=text)
        self._updated = time.monotonic()


def _uuid(value: Any) -> UUID:
    return value if isinstance(value, UUID) else UUID(str(value))
