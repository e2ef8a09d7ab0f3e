"""Which rows each committed optimiser step was taught from, and the proof that each was used once an epoch.

::

    training/ledger/0001.jsonl   {"attempt": "001", "from_step": 0, "world_size": 2, ...}, then a line a step:
                                 {"step": 1, "rows": [17, 4, 23, 8]}

Every start of the training program has a file of its own, in the order of the starts. A step counts once the checkpoint
after it is whole: what a start did beyond the checkpoint that its successor went on from is lost, was done again, and is
left out here. The rows are those that came out of the data loaders of all ranks, not those that were planned.

    python -m tasks.training.ledger storage/runs/latest/training
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tasks.contracts.files import append


@dataclass(frozen=True)
class Start:
    """The first line of a ledger: who writes it, from where on, and what an epoch is."""

    attempt: str
    from_step: int
    world_size: int
    global_batch_size: int
    steps_per_epoch: int
    num_rows: int


class LedgerError(ValueError):
    """The ledger does not prove what it should."""


class Ledger:
    """The ledger of one start. Lines wait in memory until a checkpoint is about to be written."""

    def __init__(self, folder: Path, start: Start) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(path.stem) for path in folder.glob("*.jsonl")), default=0)
        self._path = folder / f"{number:04d}.jsonl"
        # "x": never a file that another start writes.
        with self._path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(asdict(start)) + "\n")
        self._waiting: dict[int, list[int]] = {}

    def record(self, step: int, rows: list[int]) -> None:
        """Remember the rows of a finished optimiser step."""
        self._waiting[step] = rows

    def flush(self, step: int) -> None:
        """Make the lines up to ``step`` durable; what does not fit on the disk waits on.

        Raises:
            OSError: the disk is full or fails.
        """
        due = [number for number in list(self._waiting) if number <= step]
        text = "".join(json.dumps({"step": number, "rows": self._waiting[number]}) + "\n" for number in due)
        append(self._path, text.encode(), durable=True)
        for number in due:
            del self._waiting[number]


@dataclass(frozen=True)
class Proof:
    """What a ledger shows: every row that an epoch has room for was used once in it, over all starts."""

    num_starts: int
    num_steps: int
    rows_per_epoch: int
    num_redone: int


def committed(folder: Path) -> tuple[list[Start], dict[int, list[int]], int]:
    """All starts, the rows of each committed step, and how many steps were done again.

    Raises:
        LedgerError: a line is none, or a start goes on from a step that no start before it reached.
    """
    starts: list[Start] = []
    steps: dict[int, list[int]] = {}
    redone = 0
    for path in sorted(folder.glob("*.jsonl")):
        lines = [_line(path, text) for text in path.read_text(encoding="utf-8").splitlines()]
        start = Start(**lines[0])
        lost = [step for step in steps if step > start.from_step]
        for step in lost:
            del steps[step]
        redone += len(lost)
        if len(steps) != start.from_step:
            raise LedgerError(f"{path} goes on from step {start.from_step} and the starts before it left {len(steps)}")
        for line in lines[1:]:
            if line["step"] in steps:
                raise LedgerError(f"{path} holds step {line['step']} twice")
            steps[line["step"]] = line["rows"]
        starts.append(start)
    if not starts:
        raise LedgerError(f"{folder} holds no ledger")
    return starts, steps, redone


def prove(folder: Path) -> Proof:
    """Prove that every step used a whole batch and no epoch used a row twice.

    Raises:
        LedgerError: naming the step and the rows.
    """
    starts, steps, redone = committed(folder)
    last = starts[-1]
    if sorted(steps) != list(range(1, len(steps) + 1)):
        gap = next(i for i in range(1, len(steps) + 2) if i not in steps)
        raise LedgerError(f"{folder}: step {gap} is missing")
    for step, rows in steps.items():
        if len(rows) != last.global_batch_size:
            raise LedgerError(f"{folder}: step {step} used {len(rows)} rows instead of {last.global_batch_size}")
    for first in range(1, len(steps) + 1, last.steps_per_epoch):
        used: dict[int, int] = {}
        for step in range(first, min(first + last.steps_per_epoch, len(steps) + 1)):
            for row in steps[step]:
                if not 0 <= row < last.num_rows:
                    raise LedgerError(f"{folder}: step {step} used row {row} of {last.num_rows}")
                if row in used:
                    raise LedgerError(f"{folder}: row {row} was used in steps {used[row]} and {step} of one epoch")
                used[row] = step
    return Proof(len(starts), len(steps), last.steps_per_epoch * last.global_batch_size, redone)


def _line(path: Path, text: str) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise LedgerError(f"{path}: {text[:80]!r} is no line of a ledger: {error}") from error
    return value


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print("usage: python -m tasks.training.ledger <run's training folder>", file=sys.stderr)
        return 2
    try:
        proof = prove(Path(argv[1]) / "ledger")
    except LedgerError as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"{proof.num_steps} committed steps in {proof.num_starts} starts ({proof.num_redone} more were lost and done "
        f"again); every epoch used {proof.rows_per_epoch} rows, each once"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
