"""Inference as a job of the pool: ``torchrun -m tasks.inference spec.json``, one process per GPU.

The spec's arguments: ``model``, ``inference`` (settings), ``storage`` (shared folder), ``dataset`` (prepared folder),
``adapter`` (folder, or null for the original model), ``output`` (folder to make).

By hand: ``python -m tasks.inference ask RUN "question" --tools tools.json`` puts a question to both models of a run.
"""

import sys

if __name__ == "__main__":
    if sys.argv[1:2] == ["ask"]:
        from tasks.inference.ask import main

        sys.exit(main(sys.argv[2:]))
    from tasks.contracts.attempt import run_rank

    run_rank("tasks.inference.run:run", sys.argv)
