"""A finished run's test requests again, by the clock: ``python -m tests.benchmarks.demo_inference STORAGE RUN [--requests 100]``.

Both inference jobs of a run of this machine's pool, submitted as the run submitted them, with so many requests and no answers
from before. Wall clock from submission to end: the start of the ranks and the losses are in it. Table last.
"""

import argparse
import dataclasses
import shutil
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq

from tasks.contracts.run_folder import RunFolder
from tasks.contracts.settings import StorageSettings
from tasks.pool.attempts import newest_attempt, read_spec
from tasks.pool.local import LocalPool
from tasks.pool.supervise import Watch, supervise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("storage", type=Path)
    parser.add_argument("run")
    parser.add_argument("--requests", type=int, default=100)
    arguments = parser.parse_args()
    folder = RunFolder(StorageSettings(shared=str(arguments.storage.resolve())), arguments.run)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        dataset = Path(shutil.copytree(folder.dataset, home / "dataset"))
        requests = pq.read_table(dataset / "test.parquet")[: arguments.requests]
        pq.write_table(requests, dataset / "test.parquet")
        for which in ("baseline", "finetuned"):
            asked = folder.job(f"run_inference_{which}")
            attempt = newest_attempt(asked) if asked.exists() else None
            if attempt is None:
                raise SystemExit(
                    f"{arguments.run} has no job {asked.name}, it took another run's answers; name that run"
                )
            spec = read_spec(attempt)
            job = dataclasses.replace(
                spec,
                folder=str(home / which),
                log_folder=None,
                arguments={**spec.arguments, "dataset": str(dataset), "output": str(home / f"{which}-answers")},
            )
            began = time.perf_counter()
            supervise(LocalPool(home / "pool"), job, Watch())
            rows.append((which, time.perf_counter() - began))
            print(rows[-1], flush=True)
    print(f"\n{requests.num_rows} requests of {arguments.run}")
    for which, seconds in [*rows, ("both", sum(seconds for _, seconds in rows))]:
        print(f"{which:10} {seconds:6.1f} s")


if __name__ == "__main__":
    main()
