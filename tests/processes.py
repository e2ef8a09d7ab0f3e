"""Processes that a test's jobs have on this machine."""

from pathlib import Path

import psutil

from tasks.pool.local import TOKEN

MARKS = {TOKEN, "SLURM_JOB_ID"}
"""Either is in the environment of every process of a job."""


def processes_under(folder: Path) -> list[psutil.Process]:
    """Runners, agents and ranks of jobs under ``folder``, which their command lines name."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = any(str(folder) in part for part in process.cmdline())
            if ours and MARKS & process.environ().keys() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
