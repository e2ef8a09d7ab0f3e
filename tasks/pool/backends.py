"""The backend that the settings name."""

from pathlib import Path

from tasks.contracts.job import Pool
from tasks.contracts.settings import Experiment
from tasks.pool.attempts import backend_of
from tasks.pool.kubernetes import KubernetesPool
from tasks.pool.local import LocalPool
from tasks.pool.slurm import SlurmPool


def open_pool(experiment: Experiment, attempt: Path | None = None) -> Pool:
    """The pool of a run, or the one that an attempt of it was submitted to, since a run can be resumed on another."""
    pool = experiment.pool
    backend = (attempt and backend_of(attempt)) or pool.backend
    if backend == "slurm":
        return SlurmPool(pool.slurm, pool.network)
    if backend == "kubernetes":
        return KubernetesPool(pool.kubernetes, pool.network)
    return LocalPool(Path(experiment.storage.shared) / "pool", share_gpus=pool.local.share_gpus)
