"""Where everything of a run lies."""

import re
from dataclasses import dataclass
from pathlib import Path

from tasks.contracts.settings import StorageSettings

STAGES = ("prepare_dataset", "run_inference_baseline", "train_adapter", "run_inference_finetuned")
"""Those that are jobs on the pool, in order."""
CHAMPION_STAGE = "run_inference_champion"
"""One more where the present champion is asked as well."""
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True)
class RunFolder:
    """``<storage>/runs/<run>`` and what is in it.

    Raises:
        ValueError: the run's name could leave the folder or is no name on some scheduler.
    """

    storage: StorageSettings
    run: str

    def __post_init__(self) -> None:
        if not SAFE_NAME.fullmatch(self.run):
            raise ValueError(
                f"run={self.run!r} is not a usable name: up to 63 letters, digits, '.', '_' and '-', "
                "beginning with a letter or digit"
            )

    @property
    def root(self) -> Path:
        return Path(self.storage.shared) / "runs" / self.run

    @property
    def experiment(self) -> Path:
        return self.root / "experiment.json"

    @property
    def owner(self) -> Path:
        """The lease of the flow that drives the run; absent when none does."""
        return self.root / "owner.json"

    @property
    def dataset(self) -> Path:
        return self.root / "dataset"

    @property
    def training(self) -> Path:
        return self.root / "training"

    @property
    def adapter(self) -> Path:
        return self.training / "adapter"

    @property
    def champion(self) -> Path:
        """The adapter that the new one is held against, where it is asked for: ``adapter/``, and which it is."""
        return self.root / "champion"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def jobs(self) -> Path:
        return self.root / "jobs"

    def inference(self, which: str) -> Path:
        """The answers of ``baseline``, ``finetuned`` or ``champion``."""
        return self.root / "inference" / which

    def job(self, stage: str) -> Path:
        """A stage's attempts."""
        return self.jobs / stage

    @property
    def stages(self) -> tuple[str, ...]:
        """This run's stages that are jobs."""
        return (*STAGES, CHAMPION_STAGE) if self.job(CHAMPION_STAGE).exists() else STAGES

    def job_logs(self, stage: str) -> str | None:
        """Where a stage's node logs go when logs have a root of their own."""
        return None if self.storage.logs is None else str(Path(self.storage.logs) / self.run / stage)

    @property
    def cache(self) -> Path:
        """Results that several runs share, by the digest of what made them."""
        return Path(self.storage.shared) / "cache"

    @property
    def latest(self) -> Path:
        return self.root.parent / "latest"


@dataclass(frozen=True)
class CheckFolder(RunFolder):
    """``<storage>/checks/<run>``: a cluster check."""

    @property
    def root(self) -> Path:
        return Path(self.storage.shared) / "checks" / self.run

    @property
    def check(self) -> Path:
        """Its settings, and which flow run and MLflow run it is."""
        return self.root / "check.json"

    @property
    def verdict(self) -> Path:
        """The report in full; written last."""
        return self.report / "cluster-check.json"
