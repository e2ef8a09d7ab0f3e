"""Training as a job of the pool: ``torchrun -m tasks.training spec.json``, one process per GPU.

The spec's arguments: ``model``, ``training`` (settings), ``storage`` (shared folder), ``dataset`` (prepared folder),
``output`` (the run's training folder).
"""

import sys

from tasks.contracts.attempt import run_rank

if __name__ == "__main__":
    run_rank("tasks.training.train:train", sys.argv)
