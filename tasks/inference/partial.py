"""Answers on disk as they come, so that another attempt goes on where one ended.

They lie in ``jobs/<stage>/<attempt>/partial-<rank>.jsonl``, one record of a prediction a line.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tasks.contracts.attempt import Attempt
from tasks.contracts.files import append, read_json
from tasks.contracts.prediction import Prediction, prediction_from_record, prediction_to_record


class PartialAnswers:
    """What one rank of an attempt has answered."""

    def __init__(self, attempt: Attempt, rank: int) -> None:
        self._path = attempt.folder / f"partial-{rank}.jsonl"
        if self._path.exists():
            # Half a line, of a life that was killed in it, would spoil the one that follows.
            with self._path.open("r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)

    def add(self, predictions: Sequence[Prediction]) -> None:
        """Keep them, whole or not at all."""
        lines = "".join(json.dumps(prediction_to_record(p)) + "\n" for p in predictions)
        append(self._path, lines.encode())


def read_partial(folder: Path) -> list[Prediction]:
    """The answers of all ranks of one attempt; a line that a killed rank left half written is none."""
    found = []
    for path in sorted(folder.glob("partial-*.jsonl")):
        whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
        found += [prediction_from_record(json.loads(line)) for line in whole.splitlines()]
    return found


def answered_before(attempt: Attempt) -> list[Prediction]:
    """What was answered before at the same job, each example once: by earlier attempts, and by this one before it was requeued.

    Only those that were told the same count: another model's or another setting's answers are not these.
    """
    found: dict[str, Prediction] = {}
    for spec in sorted(attempt.folder.parent.glob("*/spec.json")):
        if read_json(spec)["arguments"] == attempt.arguments:
            found |= {p.example_id: p for p in read_partial(spec.parent)}
    return list(found.values())
