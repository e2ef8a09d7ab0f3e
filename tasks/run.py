"""What every stage of one run is told: the settings, where its files lie, and its MLflow run."""

import threading
from dataclasses import dataclass
from pathlib import Path

from tasks.contracts.job import Pool
from tasks.contracts.run_folder import RunFolder
from tasks.contracts.settings import Experiment
from tasks.pool.kubernetes import KubernetesPool
from tasks.pool.local import LocalPool
from tasks.pool.slurm import SlurmPool
from tasks.tracking.mlflow_runs import Tracking


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        mlflow_run_id: the parent run in MLflow.
        stop: set when the run is asked to end; every stage then cancels its job.
    """

    experiment: Experiment
    folder: RunFolder
    tracking: Tracking
    mlflow_run_id: str
    stop: threading.Event

    @property
    def pool(self) -> Pool:
        """The pool of the settings."""
        return open_pool(self.experiment)


def open_pool(experiment: Experiment) -> Pool:
    """The backend of the settings."""
    if experiment.pool.backend == "slurm":
        return SlurmPool(experiment.pool.slurm)
    if experiment.pool.backend == "kubernetes":
        return KubernetesPool(experiment.pool.kubernetes)
    return LocalPool(Path(experiment.storage.shared) / "pool")
