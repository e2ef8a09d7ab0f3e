"""The jobs of all runs, found on the shared folder: what any process needs to take one over."""

from dataclasses import dataclass
from pathlib import Path

from tasks.contracts.cluster_settings import ClusterCheck
from tasks.contracts.files import read_json
from tasks.contracts.job import JobHandle, Pool
from tasks.contracts.run_folder import CheckFolder, RunFolder
from tasks.contracts.settings import Experiment, StorageSettings
from tasks.pool.attempts import backend_of, newest_attempt
from tasks.pool.backends import open_pool


class NoSuchJob(ValueError):
    """Nothing on disk has that name; the message lists what there is."""


@dataclass(frozen=True)
class JobOnDisk:
    """One attempt at a stage of a run.

    Attributes:
        run, stage, attempt: its name, ``run/stage/attempt``.
    """

    experiment: Experiment
    run: str
    stage: str
    attempt: str
    path: Path

    @property
    def name(self) -> str:
        return f"{self.run}/{self.stage}/{self.attempt}"

    @property
    def handle(self) -> JobHandle:
        return JobHandle(str(self.path))

    @property
    def backend(self) -> str:
        return backend_of(self.path) or "by hand"

    @property
    def pool(self) -> Pool:
        return open_pool(self.experiment, self.path)


def read_run(storage: Path, run: str) -> tuple[Experiment, RunFolder]:
    """The settings and the folder of a run.

    Raises:
        NoSuchJob: there is no such run.
    """
    folder = RunFolder(StorageSettings(shared=str(storage)), run)
    if not folder.experiment.exists():
        known = sorted((p.parent.name for p in (storage / "runs").glob("*/experiment.json")), key=str)
        raise NoSuchJob(f"{storage} has no run {run!r}; there are: {', '.join(known[-20:]) or 'none'}")
    experiment = Experiment.model_validate(read_json(folder.experiment)["experiment"])
    return experiment, RunFolder(experiment.storage, run)


def jobs_of_run(storage: Path, run: str, *, every_attempt: bool = False) -> list[JobOnDisk]:
    """The newest attempt at each stage of a run, or all attempts, in the order in which they began."""
    experiment, folder = read_run(storage, run)
    found: list[Path] = []
    for stage in folder.jobs.glob("*"):
        newest = newest_attempt(stage)
        if newest is not None:
            found += sorted(p.parent for p in stage.glob("*/spec.json")) if every_attempt else [newest]
    found.sort(key=lambda path: (path / "spec.json").stat().st_mtime)
    return [JobOnDisk(experiment, run, path.parent.name, path.name, path) for path in found]


def all_runs(storage: Path) -> list[str]:
    """The names of all runs, the oldest first."""
    found = [p.parent for p in (storage / "runs").glob("*/experiment.json") if not p.parent.is_symlink()]
    return [path.name for path in sorted(found, key=lambda path: (path / "experiment.json").stat().st_mtime)]


def read_check(storage: Path, name: str) -> tuple[ClusterCheck, CheckFolder]:
    """The settings and the folder of a cluster check.

    Raises:
        NoSuchJob: there is no such check.
    """
    folder = CheckFolder(StorageSettings(shared=str(storage)), name)
    if not folder.check.exists():
        raise NoSuchJob(f"{storage} has no check {name!r}")
    check = ClusterCheck.model_validate(read_json(folder.check)["check"])
    return check, CheckFolder(check.storage, name)


def all_checks(storage: Path) -> list[str]:
    """The names of all cluster checks, the oldest first."""
    found = [p.parent for p in (storage / "checks").glob("*/check.json") if not p.parent.is_symlink()]
    return [path.name for path in sorted(found, key=lambda path: (path / "check.json").stat().st_mtime)]


def find_jobs(storage: Path, name: str) -> list[JobOnDisk]:
    """The jobs that ``run``, ``run/stage`` or ``run/stage/attempt`` names; the newest attempt where none is given.

    Raises:
        NoSuchJob: there is none.
    """
    run, _, rest = name.strip("/").partition("/")
    if run == "latest":
        run = (storage / "runs" / "latest").resolve().name
    stage, _, attempt = rest.partition("/")
    jobs = jobs_of_run(storage, run, every_attempt=bool(attempt))
    found = [job for job in jobs if stage in ("", job.stage) and attempt in ("", job.attempt)]
    if not found:
        raise NoSuchJob(f"{name!r} names no job; run {run} has: {', '.join(job.name for job in jobs) or 'none'}")
    return found
