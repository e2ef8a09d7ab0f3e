"""The backend that the settings name."""

from pathlib import Path
from typing import Protocol

from tasks.contracts.job import Pool
from tasks.contracts.pool_settings import PoolSettings
from tasks.contracts.settings import StorageSettings
from tasks.pool.attempts import backend_of
from tasks.pool.kubernetes import KubernetesPool
from tasks.pool.local import LocalPool
from tasks.pool.slurm import SlurmPool


class UsesPool(Protocol):
    """Settings of whatever runs jobs: a fine-tuning run, a cluster check."""

    @property
    def pool(self) -> PoolSettings: ...
    @property
    def storage(self) -> StorageSettings: ...


def open_pool(settings: UsesPool, attempt: Path | None = None) -> Pool:
    """The pool of a run, or the one that an attempt of it was submitted to, since a run can be resumed on another."""
    pool = settings.pool
    backend = (attempt and backend_of(attempt)) or pool.backend
    if backend == "slurm":
        return SlurmPool(pool.slurm, pool.network)
    if backend == "kubernetes":
        return KubernetesPool(pool.kubernetes, pool.network)
    return LocalPool(Path(settings.storage.shared) / "pool", share_gpus=pool.local.share_gpus)
