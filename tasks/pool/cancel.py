"""Ends everything that a run has in the pool."""

from tasks.contracts.job import JobHandle, PoolError
from tasks.contracts.run_folder import RunFolder
from tasks.pool.backends import UsesPool, open_pool


def cancel_run(settings: UsesPool, folder: RunFolder) -> None:
    """Stop every job of a run; when this returns none of their processes is left.

    Raises:
        PoolError: of every job that could not be ended; the others were.
    """
    errors: list[str] = []
    for newest in sorted(folder.jobs.glob("*/NEWEST")):
        attempt = newest.parent / newest.read_text().strip()
        handle = JobHandle(str(attempt))
        try:
            open_pool(settings, attempt).cancel(handle)
        except PoolError as error:
            errors.append(f"{handle}: {error}")
    if errors:
        raise PoolError("\n".join(errors))
