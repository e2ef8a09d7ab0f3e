"""The backend that the settings name."""

from pathlib import Path

from tasks.contracts.job import Pool
from tasks.contracts.settings import Experiment
from tasks.pool.kubernetes import KubernetesPool
from tasks.pool.local import LocalPool
from tasks.pool.slurm import SlurmPool


def open_pool(experiment: Experiment) -> Pool:
    """The pool of a run."""
    pool = experiment.pool
    if pool.backend == "slurm":
        return SlurmPool(pool.slurm, pool.network)
    if pool.backend == "kubernetes":
        return KubernetesPool(pool.kubernetes, pool.network)
    return LocalPool(Path(experiment.storage.shared) / "pool", share_gpus=pool.local.share_gpus)
