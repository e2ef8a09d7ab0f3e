"""What every stage of one run is told: the settings, where its files lie, and its MLflow run."""

import threading
from dataclasses import dataclass

from tasks.contracts.job import Pool
from tasks.contracts.run_folder import RunFolder
from tasks.contracts.settings import Experiment
from tasks.pool.backends import open_pool
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
