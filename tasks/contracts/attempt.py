"""One attempt at a job, as the ranks and the orchestrator share it: a folder.

::

    jobs/<stage>/NEWEST             number of the newest attempt; older ones may no longer write results
    jobs/<stage>/<attempt>/spec.json        the job, written before anything starts
                           begun.json       written by rank 0: all ranks have met
                           metrics.jsonl    {"step": 10, "time": 1750000000.0, "metrics": {"train/loss": 1.2}} a line
                           progress.json    {"done": 10, "total": 39, "unit": "steps"}
                           result.json      written last, by rank 0
"""

from __future__ import annotations

import gc
import json
import os
import pkgutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.contracts.files import append, read_json, write_json

BEGUN = "begun.json"


class TryAgain(RuntimeError):
    """Another attempt will do better: what this one learnt is written down for it."""


class StaleAttempt(RuntimeError):
    """This attempt was replaced by a newer one and must not write."""


@dataclass(frozen=True)
class Attempt:
    """The folder of one attempt."""

    folder: Path

    @property
    def arguments(self) -> dict[str, Any]:
        """What the module was told."""
        arguments: dict[str, Any] = read_json(self.folder / "spec.json")["arguments"]
        return arguments

    def check_newest(self) -> None:
        """Raise :class:`StaleAttempt` if a newer attempt exists: a rank that outlived its node must not write."""
        newest = (self.folder.parent / "NEWEST").read_text().strip()
        if newest != self.folder.name:
            raise StaleAttempt(f"attempt {self.folder.name} of {self.folder.parent} was replaced by attempt {newest}")

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one point of each metric; the orchestrator forwards them to MLflow."""
        line = json.dumps({"step": step, "time": time.time(), "metrics": dict(metrics)})
        append(self.folder / "metrics.jsonl", line.encode() + b"\n")

    def report_progress(self, done: int, total: int, unit: str) -> None:
        """Say how far the work is."""
        write_json(self.folder / "progress.json", {"done": done, "total": total, "unit": unit})

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Mark the job's work complete; nothing may follow."""
        self.check_newest()
        write_json(self.folder / "result.json", result)


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    done: int
    total: int
    unit: str


def read_progress(folder: Path) -> Progress | None:
    """The last progress an attempt reported."""
    path = folder / "progress.json"
    return Progress(**read_json(path)) if path.exists() else None


def read_result(folder: Path) -> dict[str, Any]:
    """What a finished attempt left."""
    result: dict[str, Any] = read_json(folder / "result.json")
    return result


def read_points(job: Path) -> list[tuple[int, dict[str, float]]]:
    """``(step, metrics)`` over all attempts at a job, in the order of the steps; where two logged one step, the newer counts.

    A line that a killed rank left half written is no point.
    """
    points: dict[int, dict[str, float]] = {}
    for file in sorted(job.glob("*/metrics.jsonl")):
        whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")
        for line in whole.splitlines():
            point = json.loads(line)
            points[point["step"]] = point["metrics"]
    return sorted(points.items())


Program = Callable[["Attempt"], Mapping[str, Any] | None]


def run_rank(main: Program | str, argv: list[str]) -> None:
    """The frame of every multi-process program: read the spec, record this rank's error, write the result last.

    An exception is kept by torch's ``@record`` in the file that torchrun names, so that the pool can show the first failing
    rank's own error.

    Args:
        main: returns the result on rank 0 and None on the others. A name, ``package.module:function``, is imported here, so that
            what cannot be imported on a node is its rank's own error as well.
    """
    if len(argv) != 2:
        raise SystemExit(f"usage: python -m {argv[0]} spec.json (written by the pool), got {argv[1:]}")
    # What is imported stays. Python would look for garbage among it, for a fifth of the seconds that importing takes, and for
    # 0.3 s now and then while other ranks wait.
    gc.disable()
    import psutil
    from torch.distributed.elastic.multiprocessing.errors import record

    attempt = Attempt(Path(argv[1]).resolve().parent)
    # What is imported is the program's own work as well.
    started = psutil.Process().create_time()

    def recorded() -> None:
        program = pkgutil.resolve_name(main) if isinstance(main, str) else main
        gc.freeze()
        gc.enable()
        # torchrun starts ranks once all nodes have met.
        if int(os.environ.get("RANK", "0")) == 0:
            write_json(attempt.folder / BEGUN, {"time": time.time()})
        result = program(attempt)
        if int(os.environ.get("RANK", "0")) == 0:
            if result is None:
                raise RuntimeError("rank 0 finished without a result")
            attempt.write_result({"started": started, "finished": time.time(), **result})

    record(recorded)()
