"""The tokenised conversations that training reads, mapped into memory."""

import itertools
from pathlib import Path

import pyarrow.compute as pc
from datasets import Dataset

from tasks.contracts.settings import TrainingSettings
from tasks.dataset.split import permutation
from tasks.dataset.stored import IGNORED


def load_rows(path: Path, settings: TrainingSettings) -> Dataset:
    """The tokenised conversations, mapped into memory: ``input_ids`` and ``labels`` (-100 outside the answer)."""
    rows = Dataset.from_file(str(path))
    return shuffled_answers(rows, settings.seed) if settings.shuffle_answers else rows


def num_tokens(rows: Dataset) -> list[int]:
    """The length of each conversation, counted without unpacking it."""
    lengths: list[int] = pc.list_value_length(rows.with_format("arrow")[:]["input_ids"]).to_pylist()
    return lengths


def shuffled_answers(rows: Dataset, seed: int) -> Dataset:
    """The control experiment: every request with the answer to some other request."""
    pieces = [_pieces(row["input_ids"], row["labels"]) for row in rows]
    answers = [ids for conversation in pieces for ids, is_answer in conversation if is_answer]
    swapped = iter([answers[i] for i in permutation(len(answers), seed)])
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for conversation in pieces:
        ids: list[int] = []
        labels: list[int] = []
        for piece, is_answer in conversation:
            taught = next(swapped) if is_answer else piece
            ids += taught
            labels += taught if is_answer else [IGNORED] * len(taught)
        columns["input_ids"].append(ids)
        columns["labels"].append(labels)
    return Dataset.from_dict(columns)


def _pieces(ids: list[int], labels: list[int]) -> list[tuple[list[int], bool]]:
    """A tokenised conversation as alternating stretches, each with whether it is an answer."""
    grouped = itertools.groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    return [([i for i, _ in pairs], is_answer) for is_answer, pairs in grouped]
