"""Source rows to the files that training and inference read.

Texts, tokens and keys go through files under ``.work``; while rows are compared, about 100 bytes each are in memory.
"""

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.contracts.conversation import Tool, example_from_record, example_to_record, tools_in
from tasks.contracts.files import write_json
from tasks.contracts.settings import DatasetSettings
from tasks.dataset.augment import Augmenter, is_on
from tasks.dataset.benchmarks import read_benchmarks
from tasks.dataset.convert import Converter, Rejected, asked_of
from tasks.dataset.packing import fill, pack
from tasks.dataset.quality import Quality, write_quality
from tasks.dataset.ragged import Ragged, any_in, ragged_column
from tasks.dataset.rendering.encode import marked
from tasks.dataset.rendering.family import Family
from tasks.dataset.row_store import RowStore, append_lists
from tasks.dataset.sources.files import DatasetNotFound
from tasks.dataset.sources.formats import FORMATS
from tasks.dataset.sources.read import read_chunks
from tasks.dataset.split import (
    NONE,
    REASONS,
    SLICES,
    TEST,
    TRAIN,
    UNSEEN_TOOLS,
    Choice,
    Keyed,
    check_not_empty,
    choose,
    shuffle_keys,
)
from tasks.dataset.stored import IGNORED
from tasks.dataset.workers import ordered_map

EXAMPLE_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("id", "messages", "tools", "expected", "answer", "source", "slice", "category")]
)
NUM_REJECTED_SHOWN = 3
MAX_WORKERS = 32
"""Unless the settings say more: the process that gathers keeps up with no more."""
NUM_DISTRACTORS = 2000
ROWS_PER_WRITE = 1024
PROGRESS_S = 5


@dataclass(frozen=True)
class Taught:
    """The training rows: which of ``tokens`` they are, in the seeded order."""

    tokens: Ragged
    rows: np.ndarray


def prepare(
    settings: DatasetSettings,
    family: Family,
    tokenizer: Path,
    folder: Path,
    on_progress: Callable[[int], None] = lambda num_rows: None,
    *,
    may_be_empty: bool = False,
) -> dict[str, Any]:
    """Write the prepared dataset into ``folder``, its manifest last, and return the manifest.

    Args:
        tokenizer: a ``tokenizer.json``.
        on_progress: told every few seconds how many rows have been read.
        may_be_empty: for a look at a few rows: no error where nothing is left to train on or to test with.

    Raises:
        DatasetNotFound: a source is not there, or no row of any is usable.
        ValueError: too few rows for the split.
    """
    work = folder / ".work"
    work.mkdir(parents=True)
    num_workers = settings.num_workers or min(os.cpu_count() or 1, MAX_WORKERS)
    pack_tokens = settings.packing_length_tokens
    # First: a benchmark that is not there is known before hours of reading.
    benchmarks = read_benchmarks(settings.benchmarks, settings.decontaminate_words or 0)
    with removed_at_the_end(work), RowStore(work) as store:
        quality = _read(settings, family, tokenizer, num_workers, store, folder / "rejected.jsonl", on_progress)
        keyed = store.keyed
        choice = choose(keyed, settings, benchmarks)
        if not may_be_empty:
            check_not_empty(choice, settings)
        quality.left_out = choice.counts
        quality.notes = _shortfalls(settings, choice)
        taught_by_source = np.bincount(keyed.source.read()[choice.slice == TRAIN], minlength=len(quality.sources))
        for source, count in zip(quality.sources.values(), taught_by_source.tolist(), strict=True):
            source["taught"] = count
        _write_left_out(store, choice, folder / "left_out.jsonl")
        _write_test(store, choice, settings, folder / "test.parquet", quality)
        taught = _write_train(store, choice, settings, family, tokenizer, num_workers, folder, quality)
        lengths = _write_tokens(taught, folder / "train.arrow")
        read_lengths = store.tokens.lengths
        quality.lengths = {name: read_lengths[choice.slice == code] for name, code in SLICES.items()}
        quality.lengths["train"] = lengths
        quality.overlap = _overlap(keyed, choice, settings)
    if pack_tokens is not None:
        quality.packing = _write_packs(lengths, pack_tokens, folder / "packs.arrow")
    write_quality(quality, folder)
    manifest = {
        "num_train_rows": len(lengths),
        "num_test_rows": quality.written["test"] + quality.written["unseen_tools"],
        "train_tokens": int(lengths.sum()),
        "num_packs": quality.packing and quality.packing["packs"],
    }
    write_json(folder / "manifest.json", manifest)
    return manifest


@contextmanager
def removed_at_the_end(folder: Path) -> Iterator[None]:
    """A folder that does not outlive the block, however that ends."""
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read(
    settings: DatasetSettings,
    family: Family,
    tokenizer: Path,
    num_workers: int,
    store: RowStore,
    quarantine: Path,
    on_progress: Callable[[int], None],
) -> Quality:
    """All rows into the store or the quarantine file, counted."""
    sources = {s.title: {"read": 0, "rejected": 0, "usable": 0, "taught": 0} for s in settings.sources}
    quality = Quality(0, Counter(), {}, Counter(), sources)
    first_rejected: list[Rejected] = []
    reported = time.monotonic()
    converted = ordered_map(Converter, (settings, family, tokenizer), read_chunks(settings), num_workers)
    with quarantine.open("w", encoding="utf-8") as file:
        for chunk in converted:
            store.add(chunk.batch)
            for row in chunk.rejected:
                file.write(json.dumps(asdict(row)) + "\n")
            counts = sources[chunk.source]
            counts["usable"] += len(chunk.batch)
            counts["rejected"] += len(chunk.rejected)
            counts["read"] += len(chunk.batch) + len(chunk.rejected)
            quality.read += len(chunk.batch) + len(chunk.rejected)
            quality.rejected.update(row.reason for row in chunk.rejected)
            quality.repairs.update(chunk.repairs)
            first_rejected += chunk.rejected[: NUM_REJECTED_SHOWN - len(first_rejected)]
            if time.monotonic() - reported >= PROGRESS_S:
                on_progress(quality.read)
                reported = time.monotonic()
    if not len(store):
        raise DatasetNotFound(_nothing_usable(settings, quality, first_rejected))
    return quality


def _nothing_usable(settings: DatasetSettings, quality: Quality, first: Sequence[Rejected]) -> str:
    if not quality.read:
        return f"dataset.sources={settings.title!r} holds no rows"
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(quality.rejected.items()))
    shown = "\n".join(f"  {r.id}: {r.reason}: {r.detail}" for r in first)
    return (
        f"none of the {quality.read} rows of dataset.sources={settings.title!r} is usable: {reasons}. The first:\n{shown}\n"
        f"Is the source's format right? It is one of: {', '.join(FORMATS)}"
    )


def _shortfalls(settings: DatasetSettings, choice: Choice) -> list[str]:
    """What was asked for and is not there."""
    return [
        f"{found} of dataset.{setting}={wanted}; give more rows, or raise dataset.{share}={getattr(settings, share):g}"
        for code, setting, share in (
            (TEST, "num_test_rows", "test_share"),
            (UNSEEN_TOOLS, "num_unseen_tools_rows", "unseen_tools_share"),
        )
        if (found := int((choice.slice == code).sum())) < (wanted := getattr(settings, setting))
    ]


def _write_left_out(store: RowStore, choice: Choice, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in np.flatnonzero(choice.why != NONE).tolist():
            like = {} if choice.like[row] == NONE else {"like": store.id_of(choice.like[row])}
            file.write(json.dumps({"id": store.id_of(row), "reason": REASONS[choice.why[row]], **like}) + "\n")


def _write_test(store: RowStore, choice: Choice, settings: DatasetSettings, path: Path, quality: Quality) -> None:
    with pq.ParquetWriter(path, EXAMPLE_SCHEMA) as writer:
        for name in ("test", "unseen_tools"):
            for batch in store.texts(choice.slice == SLICES[name]):
                examples = (example_from_record({**record, "slice": name}) for record in batch.to_pylist())
                asked = [example_to_record(turn) for example in examples for turn in asked_of(example, settings)]
                rows = pa.RecordBatch.from_pylist(asked, schema=EXAMPLE_SCHEMA)
                quality.count(name, rows)
                writer.write_batch(rows)


def _write_train(
    store: RowStore,
    choice: Choice,
    settings: DatasetSettings,
    family: Family,
    tokenizer: Path,
    num_workers: int,
    folder: Path,
    quality: Quality,
) -> Taught:
    """``train.parquet``, and which tokens belong to its rows."""
    chosen = choice.slice == TRAIN
    batches = (_in_slice(batch, "train") for batch in store.texts(chosen))
    keys = [np.empty(0, np.uint64)]
    with pq.ParquetWriter(folder / "train.parquet", EXAMPLE_SCHEMA) as writer:

        def write(batch: pa.RecordBatch) -> None:
            quality.count("train", batch)
            writer.write_batch(batch)
            keys.append(shuffle_keys(batch.column("id").to_pylist(), settings.seed))

        if not is_on(settings.augmentation):
            tokens, rows = store.tokens, np.flatnonzero(chosen)
            for batch in batches:
                write(batch)
        else:
            tokens = store.new_tokens("augmented")
            arguments = (settings, family, tokenizer, _distractors(store, chosen, settings))
            for changed in ordered_map(Augmenter, arguments, (batch.to_pylist() for batch in batches), num_workers):
                write(pa.RecordBatch.from_pylist(changed.records, schema=EXAMPLE_SCHEMA))
                append_lists(tokens, ragged_column(changed.tokens, pa.int32()))
                quality.augmented.update(changed.counts)
            rows = np.arange(len(tokens))
    return Taught(tokens, rows[np.argsort(np.concatenate(keys), kind="stable")])


def _in_slice(batch: pa.RecordBatch, name: str) -> pa.RecordBatch:
    columns = {field: batch.column(field) for field in batch.schema.names} | {"slice": pa.array([name] * len(batch))}
    return pa.RecordBatch.from_arrays([columns[field] for field in EXAMPLE_SCHEMA.names], schema=EXAMPLE_SCHEMA)


def _distractors(store: RowStore, chosen: np.ndarray, settings: DatasetSettings) -> list[Tool]:
    """Tools that training rows offer: what is held out is not among them."""
    if not settings.augmentation.num_distractor_tools:
        return []
    found: dict[str, Tool] = {}
    for batch in store.texts(chosen):
        for text in batch.column("tools").unique().to_pylist():
            for tool in tools_in(text):
                found.setdefault(tool["name"], tool)
        if len(found) >= NUM_DISTRACTORS:
            break
    return list(found.values())[:NUM_DISTRACTORS]


def _write_tokens(taught: Taught, path: Path) -> np.ndarray:
    """Arrow stream with ``input_ids`` and ``labels`` (int32 lists), which every rank maps into memory; their lengths."""
    schema = pa.schema([(name, pa.list_(pa.int32())) for name in ("input_ids", "labels")])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for first in range(0, len(taught.rows), ROWS_PER_WRITE):
            pieces = [taught.tokens[row] for row in taught.rows[first : first + ROWS_PER_WRITE].tolist()]
            offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int32)
            ids, is_answer = marked(np.concatenate(pieces))
            columns = [pa.ListArray.from_arrays(offsets, part) for part in (ids, np.where(is_answer, ids, IGNORED))]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    lengths: np.ndarray = taught.tokens.lengths[taught.rows]
    return lengths


def _write_packs(lengths: np.ndarray, capacity: int, path: Path) -> dict[str, Any]:
    """Arrow stream with ``rows``: positions in ``train.arrow`` of each pack's conversations."""
    packs = pack(lengths, capacity)
    table = pa.table({"rows": pa.array(packs, pa.list_(pa.int32()))})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return {"packs": len(packs), "capacity_tokens": capacity, "fill": fill(lengths, len(packs), capacity)}


def _overlap(keyed: Keyed, choice: Choice, settings: DatasetSettings) -> dict[str, Any]:
    """What training and tests still have in common, measured on the rows that are written."""

    def keys_of(name: str, code: int) -> list[np.ndarray]:
        ragged = getattr(keyed, name)
        return [ragged[row] for row in np.flatnonzero(choice.slice == code)]

    def shared(name: str, wanted: list[np.ndarray]) -> np.ndarray:
        """Those of the wanted keys that stand in a training row."""
        keys = np.unique(np.concatenate([np.empty(0, np.uint64), *wanted]))
        ragged, found = getattr(keyed, "requests" if name == "asked" else name), np.zeros(len(keys), bool)
        for first, values, offsets in ragged.blocks():
            is_train = choice.slice[first : first + len(offsets) - 1] == TRAIN
            found |= np.isin(keys, values[np.repeat(is_train, np.diff(offsets))])
        return keys[found]

    asked = [*keys_of("asked", TEST), *keys_of("asked", UNSEEN_TOOLS)]
    known = shared("asked", asked)
    result: dict[str, Any] = {
        "words": settings.decontaminate_words,
        "exact_duplicates": sum(bool(np.isin(keys, known).any()) for keys in asked),
    }
    for name, code in (("test", TEST), ("unseen_tools", UNSEEN_TOOLS)) if settings.decontaminate_words else ():
        runs = keys_of("word_runs", code)
        common = shared("word_runs", runs)
        offsets = np.concatenate([[0], np.cumsum([len(keys) for keys in runs])]).astype(np.int64)
        values = np.concatenate([np.empty(0, np.uint64), *runs])
        result[name] = float(any_in(values, offsets, common).mean()) if runs else 0.0
    return result
