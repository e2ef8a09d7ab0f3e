"""Inference as a job of the pool: ``torchrun -m tasks.inference spec.json``, one process per GPU.

The spec's arguments: ``model``, ``inference`` (settings), ``storage`` (shared folder), ``dataset`` (prepared folder),
``adapter`` (folder, or null for the original model), ``output`` (folder to make).
"""

import sys

from tasks.contracts.attempt import run_rank
from tasks.inference.run import run

if __name__ == "__main__":
    run_rank(run, sys.argv)
