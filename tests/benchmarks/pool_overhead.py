"""What the pool costs a job, against plain torchrun: ``python -m tests.benchmarks.pool_overhead [rounds] [--backend slurm]``.

The toy job of the pool's tests, two nodes of one process; plain torchrun and the pool in turn. On Slurm plain torchrun is in
a batch job written by hand and waited for by ``sbatch --wait``, so that the scheduler's own time is on both sides.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tasks.contracts.files import write_json
from tasks.contracts.job import JobSpec, Pool
from tasks.contracts.pool_settings import SlurmSettings
from tasks.pool.launch import Rendezvous, agent_command
from tasks.pool.local import LocalPool
from tasks.pool.slurm import SlurmPool
from tasks.pool.supervise import Watch, supervise
from tests.conftest import REPOSITORY

ONE_MACHINE = {"PET_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


def toy(folder: Path) -> JobSpec:
    return JobSpec(
        "toy", "tests.pool.toy_job", {}, str(folder / "job"), num_nodes=2, env={"PYTHONPATH": str(REPOSITORY)}
    )


def torchrun(folder: Path, port: int) -> list[str]:
    """Plain torchrun's command of each node, over a spec that is there already."""
    attempt = folder / "job" / "001"
    attempt.mkdir(parents=True)
    write_json(attempt / "spec.json", {"arguments": {}})
    (folder / "job" / "NEWEST").write_text("001")
    command = agent_command(
        toy(folder),
        Rendezvous("127.0.0.1", port, "plain"),
        spec=str(attempt / "spec.json"),
        failures="",
        local_addr="127.0.0.1",
    )
    return [sys.executable, "-m", "torch.distributed.run", *command[4:]]


def plain(folder: Path, port: int) -> None:
    """Both nodes' torchrun, side by side."""
    command = torchrun(folder, port)
    environment = os.environ | ONE_MACHINE | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    nodes = [subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [node.wait() for node in nodes] == [0, 0]


def plain_slurm(folder: Path, port: int) -> None:
    """The same by hand on Slurm: srun and torchrun, waited for by the scheduler itself."""
    command = " ".join(torchrun(folder, port))
    exports = "".join(f"export {name}={value}\n" for name, value in {**ONE_MACHINE, "OMP_NUM_THREADS": "1"}.items())
    script = folder / "by-hand.sbatch"
    script.write_text(
        f"#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1 --output={folder}/log --chdir={REPOSITORY}\n"
        f"{exports}srun {command}\n"
    )
    subprocess.run(["sbatch", "--wait", str(script)], check=True, capture_output=True)


def pooled(pool: Pool, folder: Path) -> None:
    assert supervise(pool, toy(folder), Watch())["sum"] == 3


def timed(run, *arguments) -> float:
    began = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("rounds", type=int, nargs="?", default=5)
    parser.add_argument("--backend", choices=["local", "slurm"], default="local")
    arguments = parser.parse_args()
    by_hand = plain if arguments.backend == "local" else plain_slurm
    overheads = []
    for number in range(arguments.rounds):
        folders = [Path(tempfile.mkdtemp(prefix="pool-overhead-")) for _ in range(2)]
        pool = (
            LocalPool(folders[1] / "pool")
            if arguments.backend == "local"
            else SlurmPool(SlurmSettings(env=ONE_MACHINE))
        )
        without = timed(by_hand, folders[0], 29600 + number)
        with_pool = timed(pooled, pool, folders[1])
        overheads.append(with_pool - without)
        print(
            f"torchrun by hand {without:6.2f} s   pool {with_pool:6.2f} s   difference {overheads[-1]:+.2f} s",
            flush=True,
        )
        for folder in folders:
            shutil.rmtree(folder)
    print(f"the pool's overhead on {arguments.backend}: median {statistics.median(overheads):+.2f} s, "
          f"most {max(overheads):+.2f} s, of {arguments.rounds} pairs")  # fmt: skip


if __name__ == "__main__":
    main()
