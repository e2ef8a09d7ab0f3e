"""Source rows to the files that training and inference read."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.contracts.conversation import CATEGORIES, Example, example_from_record, example_to_record
from tasks.contracts.files import write_json, write_text
from tasks.contracts.settings import DatasetSettings
from tasks.dataset.rendering.family import Family, encode_conversation
from tasks.dataset.sources.read import FORMATS, read_rows
from tasks.dataset.sources.rows import RowRejected
from tasks.dataset.split import Split, ngram_overlap, requests, shuffle_train, split_embedded, split_source, to_example

IGNORED = -100
"""Label of a token that the loss leaves out (PyTorch's cross-entropy default)."""
NUM_EXAMPLES_SHOWN = 3


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used, with its reason code and what was wrong."""

    row_id: str
    reason: str
    detail: str


def prepare(settings: DatasetSettings, family: Family, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Write the prepared dataset into ``folder``, its manifest last, and return the manifest.

    Raises:
        ValueError: no row is usable, or too few for the split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rejected: list[Rejected] = []
    examples = list(_read(settings, rejected))
    num_rows = len(examples) + len(rejected)
    if not examples:
        raise ValueError(_nothing_usable(settings, rejected))
    split = split_embedded(examples) if settings.name == "embedded" else split_source(examples, settings)
    lengths = _reject_long(split, settings, family, tokenizer, rejected)
    shuffle_train(split, settings.seed)
    _write_tokens(split.train, family, tokenizer, folder / "train.arrow")
    _write_examples(split.train, folder / "train.parquet")
    _write_examples([*split.test, *split.unseen_tools], folder / "test.parquet")
    write_text(folder / "rejected.jsonl", "".join(json.dumps(vars(row)) + "\n" for row in rejected))
    quality: dict[str, Any] = {
        "rows": {
            "read": num_rows,
            "train": len(split.train),
            "test": len(split.test),
            "unseen_tools": len(split.unseen_tools),
            "rejected": dict(Counter(row.reason for row in rejected)),
            "left_out": split.left_out,
        },
        "categories": {
            name: {category: sum(e.category == category for e in examples) for category in CATEGORIES}
            for name, examples in _slices(split)
        },
        "num_tools": {name: len({t["name"] for e in examples for t in e.tools}) for name, examples in _slices(split)},
        "tokens": lengths,
        "overlap": {
            "exact_duplicates": _exact_duplicates(split),
            "test_requests_sharing_8_words_with_training": ngram_overlap(split.train, split.test),
            "unseen_tools_requests_sharing_8_words_with_training": ngram_overlap(split.train, split.unseen_tools),
        },
    }
    write_json(folder / "quality.json", quality)
    write_text(folder / "quality.md", quality_markdown(quality))
    manifest = {"num_train_rows": len(split.train), "num_test_rows": len(split.test) + len(split.unseen_tools)}
    manifest["train_tokens"] = lengths["train"]["total"]
    write_json(folder / "manifest.json", manifest)
    return manifest


def read_examples(path: Path) -> list[Example]:
    """The examples in one of the Parquet files that :func:`prepare` wrote."""
    return [example_from_record(record) for record in pq.read_table(path).to_pylist()]


def quality_markdown(quality: Mapping[str, Any]) -> str:
    """The quality report as a person reads it."""
    rows, overlap = quality["rows"], quality["overlap"]
    lines = [
        "## Dataset",
        "",
        "| slice | rows | " + " | ".join(CATEGORIES) + " | tools | mean tokens | longest |",
        "|---|---:|" + "---:|" * (len(CATEGORIES) + 3),
    ]
    for name in ("train", "test", "unseen_tools"):
        counts = " | ".join(str(quality["categories"][name][category]) for category in CATEGORIES)
        tokens = quality["tokens"][name]
        lines.append(
            f"| {name} | {rows[name]} | {counts} | {quality['num_tools'][name]} | {tokens['mean']} | {tokens['max']} |"
        )
    share = overlap["test_requests_sharing_8_words_with_training"]
    unseen = overlap["unseen_tools_requests_sharing_8_words_with_training"]
    lines += [
        "",
        f"{rows['read']} rows read. Rejected: {_counts(rows['rejected'])}. Left out: {_counts(rows['left_out'])}.",
        "",
        f"Test requests that also stand in the training rows: {overlap['exact_duplicates']}. Test requests that share "
        f"eight words in a row with any training request: {share:.1%} (unseen tools: {unseen:.1%}).",
    ]
    return "\n".join(lines) + "\n"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "none"


def _slices(split: Split) -> tuple[tuple[str, list[Example]], ...]:
    return ("train", split.train), ("test", split.test), ("unseen_tools", split.unseen_tools)


def _read(settings: DatasetSettings, rejected: list[Rejected]) -> Iterator[Example]:
    read = FORMATS[settings.format]
    for row_id, row in read_rows(settings):
        try:
            if isinstance(row, RowRejected):
                raise row
            yield to_example(row_id, read(row), settings.name)
        except RowRejected as error:
            rejected.append(Rejected(row_id, error.reason, error.detail))


def _nothing_usable(settings: DatasetSettings, rejected: Sequence[Rejected]) -> str:
    if not rejected:
        return f"dataset.name={settings.name!r} holds no rows"
    reasons = _counts(Counter(row.reason for row in rejected))
    shown = "\n".join(f"  {r.row_id}: {r.reason}: {r.detail}" for r in rejected[:NUM_EXAMPLES_SHOWN])
    return (
        f"none of the {len(rejected)} rows of dataset.name={settings.name!r} is usable as format "
        f"{settings.format}: {reasons}. The first:\n{shown}\nIs dataset.format right? It is one of: {', '.join(FORMATS)}"
    )


def _reject_long(
    split: Split, settings: DatasetSettings, family: Family, tokenizer: Any, rejected: list[Rejected]
) -> dict[str, dict[str, int]]:
    """Take over-long conversations out of every slice; return the token counts of what stays."""
    lengths: dict[str, dict[str, int]] = {}
    for name, examples in _slices(split):
        kept, counts = [], []
        for example in examples:
            count = len(encode_conversation(tokenizer, family, example)[0])
            if count > settings.max_length_tokens:
                detail = f"{count} tokens, dataset.max_length_tokens={settings.max_length_tokens}"
                rejected.append(Rejected(example.id, "too_long", detail))
            else:
                kept.append(example)
                counts.append(count)
        setattr(split, name, kept)
        total = sum(counts)
        lengths[name] = {
            "total": total,
            "mean": round(total / max(1, len(counts))),
            "max": max(counts, default=0),
        }
    if not split.train:
        raise ValueError(
            f"every training conversation is longer than dataset.max_length_tokens={settings.max_length_tokens} tokens; "
            "raise it"
        )
    return lengths


def _exact_duplicates(split: Split) -> int:
    train = {request for example in split.train for request in requests(example)}
    return sum(example.request in train for example in [*split.test, *split.unseen_tools])


def _write_tokens(examples: Sequence[Example], family: Family, tokenizer: Any, path: Path) -> None:
    """Arrow stream with ``input_ids`` and ``labels`` (int32 lists), which every rank maps into memory."""
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for example in examples:
        ids, is_answer = encode_conversation(tokenizer, family, example)
        columns["input_ids"].append(ids)
        columns["labels"].append([i if taught else IGNORED for i, taught in zip(ids, is_answer, strict=True)])
    table = pa.table({name: pa.array(values, pa.list_(pa.int32())) for name, values in columns.items()})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def _write_examples(examples: Sequence[Example], path: Path) -> None:
    names = ("id", "messages", "tools", "expected", "answer", "source", "slice", "category")
    schema = pa.schema([(name, pa.string()) for name in names])
    pq.write_table(pa.Table.from_pylist([example_to_record(e) for e in examples], schema=schema), path)
