"""Ends everything that a run has in the pool."""

from tasks.contracts.job import JobHandle
from tasks.contracts.run_folder import RunFolder
from tasks.contracts.settings import Experiment
from tasks.pool.backends import open_pool


def cancel_run(experiment: Experiment, folder: RunFolder) -> None:
    """Stop every job of a run; when this returns none of their processes is left."""
    pool = open_pool(experiment)
    for newest in sorted(folder.jobs.glob("*/NEWEST")):
        pool.cancel(JobHandle(str(newest.parent / newest.read_text().strip())))
