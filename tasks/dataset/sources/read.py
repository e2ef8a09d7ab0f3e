"""Raw rows of all sources of the settings, in chunks that one worker takes at a time."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.contracts.settings import DatasetSettings, SourceSettings
from tasks.dataset.embedded.generate import generate
from tasks.dataset.sources.files import (
    COLUMNS,
    DatasetNotFound,
    RawRow,
    Unread,
    as_row,
    find_files,
    is_file_name,
    parse,
    read_file,
)
from tasks.dataset.sources.formats import UnknownFormat, detect_format
from tasks.dataset.sources.rows import RowRejected

CHUNK_ROWS = 512
CHUNK_BYTES = 4 << 20
NUM_ROWS_TO_DETECT = 200


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of one source: ``(row id, raw row)``."""

    source: int
    format: str
    rows: list[tuple[str, RawRow]]


def check_dataset(settings: DatasetSettings) -> None:
    """Refuse, before anything is submitted, a dataset that cannot be there.

    Raises:
        DatasetNotFound: naming what was looked for.
    """
    for source in settings.sources:
        if source.name != "embedded" and is_file_name(source.name):
            find_files(source.name)


def read_chunks(settings: DatasetSettings) -> Iterator[Chunk]:
    """Every row of every source, in order.

    Raises:
        DatasetNotFound: a source is not there, cannot be reached, or is not what its name says.
        UnknownFormat: a source's format is ``auto`` and cannot be told.
    """
    taken: set[str] = set()
    for index, source in enumerate(settings.sources):
        rows = _rows(source, settings, taken)
        format_: str = source.format
        if format_ == "auto" and source.name == "embedded":
            format_ = "hermes"
        elif format_ == "auto":
            first = list(itertools.islice(rows, NUM_ROWS_TO_DETECT))
            rows = itertools.chain(first, rows)
            # A source without any row has no format; there is nothing to read with it either.
            format_ = _format_of(first, source.name) if first else "hermes"
            print(f"source {source.name}: rows in the format {format_}")
        for chunk in _chunks(rows):
            yield Chunk(index, format_, chunk)


def _format_of(rows: Sequence[tuple[str, RawRow]], name: str) -> str:
    columns: list[Mapping[str, Any]] = []
    problem = ""
    for _, row in rows:
        try:
            columns.append(parse(row))
        except RowRejected as error:
            problem = problem or str(error)
    if problem and not columns:
        raise UnknownFormat(
            f"{name}: none of the first {len(rows)} rows can be read; the first: {problem}; is it UTF-8, and what its name says?"
        )
    return detect_format(columns, name)


def _chunks(rows: Iterable[tuple[str, RawRow]]) -> Iterator[list[tuple[str, RawRow]]]:
    chunk: list[tuple[str, RawRow]] = []
    size = 0
    for row_id, row in rows:
        chunk.append((row_id, row))
        size += _size(row)
        if len(chunk) == CHUNK_ROWS or size > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _size(row: RawRow) -> int:
    """Bytes or characters of text in a row."""
    size = 0
    parts: list[Any] = [row.row if isinstance(row, Unread) else row]
    while parts:
        part = parts.pop()
        if isinstance(part, str | bytes):
            size += len(part)
        elif isinstance(part, Mapping):
            parts += part.values()
        elif isinstance(part, list):
            parts += part
    return size


def _rows(
    source: SourceSettings, settings: DatasetSettings, taken: set[str]
) -> Iterator[tuple[str, RawRow]]:  # fmt: skip
    """Rows with ids that no other row of the run has; ``taken`` holds the names that were used for them."""
    if source.name == "embedded":
        yield from _embedded(settings, source)
    elif is_file_name(source.name):
        for url in find_files(source.name):
            stem = _unique(url.rsplit("/", 1)[-1].rsplit(".", 1)[0], taken)
            for index, row in enumerate(read_file(url)):
                yield f"{stem}-{index:06d}", row
    else:
        stem = _unique(source.name.rsplit("/", 1)[-1], taken)
        for index, row in enumerate(_hub(source)):
            yield f"{stem}-{index:06d}", row


def _unique(stem: str, taken: set[str]) -> str:
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}~{number}"
    taken.add(name)
    return name


def _embedded(settings: DatasetSettings, source: SourceSettings) -> Iterator[tuple[str, Mapping[str, Any]]]:
    assert settings.max_rows is not None
    num_rows = min(settings.max_rows, source.max_rows or settings.max_rows)
    num_train = num_rows - settings.num_test_rows - settings.num_unseen_tools_rows
    for rows in (
        generate(split="train", num_rows=num_train, seed=settings.seed),
        generate(split="test", num_rows=settings.num_test_rows, seed=settings.seed),
        generate(split="test", num_rows=settings.num_unseen_tools_rows, seed=settings.seed, unseen_tools=True),
    ):
        for row in rows:
            yield row["id"], row


def _hub(source: SourceSettings) -> Iterator[RawRow]:
    from datasets import load_dataset

    try:
        rows = load_dataset(source.name, source.config, revision=source.revision, split="train")
    except Exception as error:  # The library raises dozens of types for "not there"; all mean the same to the user.
        raise DatasetNotFound(
            f"dataset.sources={source.name!r} (config {source.config}, revision {source.revision}) cannot be had "
            f"from the hub: {type(error).__name__}: {error}\nCheck the name, HF_TOKEN and the network, or give a "
            "local file or 'embedded'"
        ) from error
    known = [column for column in rows.column_names if column in COLUMNS]
    for row in rows.select_columns(known) if known else rows:
        yield as_row(row)
