"""What every stage of one run, or of one cluster check, is told: the settings, where its files lie, and its MLflow run."""

import threading
from dataclasses import dataclass
from typing import Protocol

from tasks.contracts.cluster_settings import ClusterCheck
from tasks.contracts.job import Pool
from tasks.contracts.run_folder import RunFolder
from tasks.contracts.settings import Experiment
from tasks.pool.backends import open_pool
from tasks.tracking.mlflow_runs import Tracking


class Driven(Protocol):
    """What a stage's job needs of the run that it belongs to."""

    @property
    def folder(self) -> RunFolder: ...
    @property
    def tracking(self) -> Tracking: ...
    @property
    def mlflow_run_id(self) -> str: ...
    @property
    def stop(self) -> threading.Event: ...
    @property
    def pool(self) -> Pool: ...
    @property
    def max_retries(self) -> int: ...


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

    @property
    def max_retries(self) -> int:
        """Further attempts at a job after a network, a device or a process gave way."""
        return self.experiment.pool.max_retries


@dataclass(frozen=True)
class CheckRun:
    """One cluster check; the attributes are those of :class:`Run`."""

    check: ClusterCheck
    folder: RunFolder
    tracking: Tracking
    mlflow_run_id: str
    stop: threading.Event

    @property
    def pool(self) -> Pool:
        """The pool of the settings."""
        return open_pool(self.check)

    @property
    def max_retries(self) -> int:
        """None: what gave way is what a check is for."""
        return 0
