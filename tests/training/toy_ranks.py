"""Ranks of the training program without a launcher: forked from a process that has imported it, so that they start at once.

What torchrun and a pool add is tested through them elsewhere; here a rank is a process that ends with an exit code.
"""

import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tasks.hardware.host import free_port
from tests.training import rank_faults

context = multiprocessing.get_context("forkserver")
# The last one freezes what the others have loaded: no rank then collects garbage in it.
context.set_forkserver_preload(["tasks.training.train", "tests.training.rank_faults", "tests.training.frozen"])


class ToyJob:
    """Attempts at one training job, in a folder as a pool would lay it out."""

    def __init__(self, root: Path, arguments: Mapping[str, Any]) -> None:
        self.root, self.arguments = root, arguments
        self.folder = root / "job"
        self.output = root / "training"

    def start(self, num_ranks: int = 2, **faults: Any) -> "ToyAttempt":
        """A new attempt; ``faults`` are those of :mod:`tests.training.rank_faults`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        number = 1 + sum(path.is_dir() for path in self.folder.iterdir())
        attempt = self.folder / f"{number:03d}"
        attempt.mkdir()
        (attempt / "spec.json").write_text(json.dumps({"arguments": self.arguments}))
        (self.folder / "NEWEST").write_text(attempt.name)
        return ToyAttempt(attempt, num_ranks, faults)

    def run(self, num_ranks: int = 2, **faults: Any) -> dict[str, Any]:
        """An attempt that must end well, and its result."""
        attempt = self.start(num_ranks, **faults)
        assert attempt.wait() == [0] * num_ranks, attempt.output()
        return attempt.result()


class ToyAttempt:
    def __init__(self, folder: Path, num_ranks: int, faults: Mapping[str, Any]) -> None:
        self.folder = folder
        port = free_port()
        self.ranks = [
            context.Process(target=_rank, args=(folder, rank, num_ranks, port, dict(faults)))
            for rank in range(num_ranks)
        ]
        for rank in self.ranks:
            rank.start()

    def wait(self, limit_s: float = 60) -> list[int | None]:
        """The exit codes of all ranks; a rank that loses its peer ends by itself."""
        deadline = time.monotonic() + limit_s
        for rank in self.ranks:
            rank.join(max(0, deadline - time.monotonic()))
        codes = [rank.exitcode for rank in self.ranks]
        for rank in self.ranks:
            rank.kill()
        if None in codes:
            pytest.fail(f"ranks still run after {limit_s} s, exit codes {codes}:\n{self.output()}")
        return codes

    def wait_for_step(self, step: int, limit_s: float = 60) -> None:
        """Until so many steps are done."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            path = self.folder / "progress.json"
            if path.exists() and json.loads(path.read_text())["done"] >= step:
                return
            time.sleep(0.005)
        pytest.fail(f"step {step} was never reached:\n{self.output()}")

    def kill_one(self, draw: random.Random) -> None:
        """SIGKILL a random rank; the others are ended as torchrun ends them."""
        victim = draw.choice(self.ranks)
        victim.kill()
        victim.join()
        for rank in self.ranks:
            rank.join(10)
            rank.kill()
            rank.join()

    def output(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("rank-*.log")))

    def error(self, rank: int) -> str:
        """The error that a rank left for torchrun."""
        path = self.folder / f"error-{rank}.json"
        return json.loads(path.read_text())["message"]["message"] if path.exists() else ""

    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / "result.json").read_text())


def _rank(folder: Path, rank: int, num_ranks: int, port: int, faults: Mapping[str, Any]) -> None:
    import torch

    from tasks.contracts.attempt import run_rank
    from tasks.training.train import train

    # The variable below came too late for torch, which is imported, but not for accelerate.
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_ERROR_FILE": str(folder / f"error-{rank}.json"),
    }
    os.environ |= faults.get("environment", {})
    log = os.open(folder / f"rank-{rank}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout.reconfigure(line_buffering=True)
    rank_faults.plant(rank, faults)
    run_rank(train, ["tasks.training", str(folder / "spec.json")])
