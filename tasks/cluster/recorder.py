"""What one process measures, kept on the shared folder as it goes: whatever ends the job, what was seen before stays."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.contracts.cluster_report import Figure, Problem, RankRecord
from tasks.contracts.files import write_text

RECORD = "rank-{rank:05d}.json"


class Recorder:
    """The record of this process in one stage.

    Args:
        record: as it begins.
    """

    def __init__(self, folder: Path, record: RankRecord) -> None:
        self._path = folder / RECORD.format(rank=record.rank)
        self._record = record
        self._figures: list[Figure] = list(record.figures)
        self._problems: list[Problem] = []
        self._facts: dict[str, Any] = dict(record.facts)
        self._write(record.doing)

    def begin(self, what: str) -> None:
        """Say what is measured next: where a process hangs, this is the last word of it."""
        self._record = self._record.model_copy(update={"step": self._record.step + 1})
        self._write(what)

    def fact(self, name: str, value: Any) -> None:
        """Something that is so, as a version."""
        self._facts[name] = value

    def figure(self, name: str, value: float | None, *, size_bytes: int | None = None, peer: str | None = None) -> None:
        """One number."""
        self._figures.append(Figure(name=name, value=value, size_bytes=size_bytes, peer=peer))

    def distribution(
        self, name: str, values: Sequence[float], *, size_bytes: int | None = None, peer: str | None = None
    ) -> None:
        """The median of repetitions, with the worse end (95th percentile of times, 5th of rates is not asked for)."""
        value = statistics.median(values) if values else None
        p95 = percentile(values, 0.95) if values else None
        self._figures.append(Figure(name=name, value=value, size_bytes=size_bytes, peer=peer, p95=p95))

    def problem(self, gate: str, error: str) -> None:
        """Something wrong."""
        print(f"PROBLEM {gate}: {error}", flush=True)
        self._problems.append(Problem(gate=gate, error=error))

    def done(self) -> None:
        """Nothing follows."""
        self._write("done")

    def _write(self, doing: str) -> None:
        self._record = self._record.model_copy(
            update={
                "doing": doing,
                "facts": dict(self._facts),
                "figures": tuple(self._figures),
                "problems": tuple(self._problems),
            }
        )
        write_text(self._path, self._record.model_dump_json(indent=1) + "\n")


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least ``share`` of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]
