"""Rows of files: JSONL, JSON, Parquet and CSV, here or wherever fsspec reaches, one at a time.

A row that cannot be read is handed on with its reason. Nothing larger than a row is held in memory.
"""

import codecs
import csv
import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

import fsspec

from tasks.dataset.rendering.strict_json import STRICT
from tasks.dataset.sources.rows import RowRejected

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
MAX_ROW_BYTES = 8 << 20
"""A larger row is no conversation that any model could be taught, and is refused unread."""
MAX_WINDOW_CHARACTERS = 128 << 20
"""Of a JSON list; past this it is not searched for the end of a row."""
BLOCK_BYTES = 1 << 20
SHOWN = 120
COLUMNS = {"conversations", "messages", "tools", "system", "chat", "query", "answers"}
"""Of all formats; others are not even read."""
_JSON_COLUMNS = COLUMNS - {"system", "chat", "query"}
BYTE_ORDER_MARK = codecs.BOM_UTF8.decode()
_SCANNER = json.JSONDecoder()
"""Finds where a value ends; what is wrong with it is found by who reads it."""


@dataclass(frozen=True, slots=True)
class Unread:
    """A row that could not be read: the reason, and the row's text or, where there is none or too much of it, its place."""

    reason: str
    detail: str
    row: str | None = None
    place: Mapping[str, Any] | None = None


RawRow = bytes | Mapping[str, Any] | Unread
"""A row as JSON text, as columns, or as the reason why it could not be read."""


class DatasetNotFound(ValueError):
    """The dataset of the settings is not there."""


class DatasetChanged(RuntimeError):
    """A file changed while it was read."""


def is_file_name(name: str) -> bool:
    """Whether a source's name means files rather than a dataset on the hub."""
    if "://" in name or name.startswith(("/", "./", "../", "~")) or _suffix(name) in SUFFIXES:
        return True
    return bool(fsspec.filesystem("file").exists(name))


def find_files(name: str) -> list[str]:
    """The file of that name, or those in the folder of that name, sorted.

    Raises:
        DatasetNotFound: naming what was looked for.
    """
    try:
        files, path = fsspec.core.url_to_fs(name)
    except (ImportError, ValueError) as error:
        raise DatasetNotFound(
            f"dataset.sources={name!r}: {error}; S3 and GCS need the extra of their name: pip install '.[s3]' or '.[gcs]'"
        ) from error
    if files.isfile(path):
        found = [path]
    elif files.isdir(path):
        found = sorted(p for p in files.find(path) if _suffix(p) in SUFFIXES)
    else:
        raise DatasetNotFound(
            f"dataset.sources={name!r}: there is no such file or folder ({path}); give a {', '.join(SUFFIXES)} file, a "
            "folder of them, a dataset id on the hub, or 'embedded'"
        )
    if not found:
        raise DatasetNotFound(f"dataset.sources={name!r}: the folder holds no {', '.join(SUFFIXES)} file")
    if _suffix(found[0]) not in SUFFIXES:
        raise DatasetNotFound(f"dataset.sources={name!r}: {found[0]!r} ends in none of {', '.join(SUFFIXES)}")
    return [files.unstrip_protocol(p) for p in found]


def read_file(url: str) -> Iterator[RawRow]:
    """The rows of one file, in order.

    Raises:
        DatasetNotFound: the whole file is not what its name says.
        DatasetChanged: it changed while it was read.
    """
    files, path = fsspec.core.url_to_fs(url)
    before = _stamp(files.info(path))
    with files.open(path, "rb") as file:
        if _suffix(path) == ".parquet":
            yield from _parquet(file, url)
        elif _suffix(path) == ".csv":
            yield from _csv(file, url)
        elif _suffix(path) == ".jsonl":
            yield from _lines(file, url)
        else:
            yield from _array(file, url)
    files.invalidate_cache()
    if _stamp(files.info(path)) != before:
        raise DatasetChanged(f"{url} changed while it was read; copy it to where nobody writes and start again")


def parse(raw: RawRow) -> Mapping[str, Any]:
    """The row's columns; raises RowRejected."""
    if isinstance(raw, Unread):
        raise RowRejected(raw.reason, raw.detail)
    if isinstance(raw, Mapping):
        return raw
    try:
        row = STRICT.decode(raw.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        raise RowRejected("not_utf8", f"{error.reason} at byte {error.start}: {raw[:SHOWN]!r}") from error
    except (ValueError, RecursionError) as error:
        raise RowRejected("not_json", f"{error}: {raw[:SHOWN]!r}") from error
    if not isinstance(row, Mapping):
        raise RowRejected("not_a_row", f"{raw[:SHOWN]!r}")
    return row


def _suffix(path: str) -> str:
    return PurePosixPath(path).suffix.lower()


def _stamp(info: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(info.get(key) for key in ("size", "mtime", "ETag", "etag", "updated", "LastModified"))


def _lines(file: IO[bytes], url: str) -> Iterator[RawRow]:
    offset = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        size = len(line)
        if size > MAX_ROW_BYTES and not line.endswith(b"\n"):
            digest, rest = hashlib.sha256(line), line
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(MAX_ROW_BYTES)
                digest.update(rest)
                size += len(rest)
            yield _too_large(line, url, offset, size, digest.hexdigest())
        elif line.strip():
            yield line
        offset += size


def _too_large(beginning: bytes, url: str, offset: int, size: int, sha256: str) -> Unread:
    detail = f"{size / 1e6:.1f} MB, at most {MAX_ROW_BYTES / 1e6:.1f}: {beginning[:SHOWN]!r}"
    place = {"file": url, "byte_offset": offset, "num_bytes": size, "sha256": sha256}
    return Unread("row_too_large", detail, place=place)


def _array(file: IO[bytes], url: str) -> Iterator[RawRow]:
    """The entries of a JSON list, of which at most one block and one row are in memory."""
    text = _Text(file, url)
    sign = text.skip_space()
    if sign == BYTE_ORDER_MARK:
        text.advance(1)
        sign = text.skip_space()
    if sign == "{":
        # Rows one after the other, as many a .json file has them.
        while text.skip_space():
            yield text.value()
        return
    if sign != "[":
        raise DatasetNotFound(f"{url} must hold a JSON list of rows; it begins with {text.shown()}")
    text.advance(1)
    is_first = True
    while (sign := text.skip_space()) != "]":
        if not sign:
            raise DatasetNotFound(f"{url} ends in the middle of its list: it is cut off")
        if not is_first:
            if sign != ",":
                raise DatasetNotFound(f"{url} is not JSON: a comma or ] is missing before {text.shown()}")
            text.advance(1)
            text.skip_space()
        is_first = False
        yield text.value()
    text.advance(1)
    if text.skip_space():
        raise DatasetNotFound(f"{url} goes on after its list with {text.shown()}: it must hold one list, or rows alone")


class _Text:
    """A window over a file's text."""

    def __init__(self, file: IO[bytes], url: str) -> None:
        self._file, self._url, self._is_complete = file, url, False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
        self._position = 0
        self._bytes_before = 0
        self.rest = ""

    def _more(self) -> bool:
        if self._is_complete:
            return False
        if (waiting := len(self.rest) - self._position) > MAX_WINDOW_CHARACTERS:
            raise DatasetNotFound(
                f"{self._url} is not JSON, or a row is longer than {waiting / 1e6:.0f} million characters: "
                f"{self.rest[self._position : self._position + SHOWN]!r}"
            )
        block = self._file.read(max(BLOCK_BYTES, waiting))
        self._is_complete = not block
        self._bytes_before += len(_encoded(self.rest[: self._position]))
        self.rest = self.rest[self._position :] + self._decoder.decode(block, final=not block)
        self._position = 0
        return not self._is_complete

    def shown(self) -> str:
        """What follows, for an error."""
        return repr(self.rest[self._position : self._position + SHOWN // 3])

    def skip_space(self) -> str:
        """The next sign that is no white space, or '' at the end of the file."""
        while True:
            while self._position < len(self.rest) and self.rest[self._position].isspace():
                self._position += 1
            if self._position < len(self.rest):
                return self.rest[self._position]
            if not self._more():
                return ""

    def advance(self, count: int) -> None:
        self._position += count

    def value(self) -> RawRow:
        """The next value as its own text, to be read by whoever takes it; raises DatasetNotFound where none ends."""
        while True:
            try:
                _, end = _SCANNER.raw_decode(self.rest, self._position)
            except (ValueError, RecursionError) as error:
                # Cut off by the window, or broken: only more text can tell.
                if self._more():
                    continue
                raise DatasetNotFound(f"{self._url} is not JSON: {error}") from error
            if end == len(self.rest) and self._more():
                continue
            row, start = _encoded(self.rest[self._position : end]), self._position
            self._position = end
            if len(row) <= MAX_ROW_BYTES:
                return row
            offset = self._bytes_before + len(_encoded(self.rest[:start]))
            return _too_large(row, self._url, offset, len(row), hashlib.sha256(row).hexdigest())


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _parquet(file: IO[bytes], url: str) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
        known = [column for column in parquet.schema_arrow.names if column in COLUMNS]
        first = 0
        for batch in parquet.iter_batches(batch_size=64, columns=known or None):
            yield from (_arrow_row(batch, row, {"file": url, "row": first + row}) for row in range(len(batch)))
            first += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise DatasetNotFound(f"{url} is not Parquet, or damaged: {error}") from error


def _arrow_row(batch: Any, row: int, place: Mapping[str, Any]) -> RawRow:
    try:
        (columns,) = batch.slice(row, 1).to_pylist()
    except UnicodeDecodeError as error:
        return Unread("not_utf8", str(error), place=place)
    except (ValueError, OverflowError) as error:
        return Unread("not_json", f"{type(error).__name__}: {error}", place=place)
    return as_row(columns)


def as_row(columns: Mapping[str, Any]) -> RawRow:
    """A row as Arrow holds it: without the ``None`` that it puts where only other rows of a struct have a member.

    That a member is null cannot be told from its not being there.
    """
    try:
        return {name: _plain(value, name) for name, value in columns.items()}
    except (ValueError, RecursionError) as error:
        return Unread("not_json", str(error), json.dumps(columns, default=str))


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(part, where) for name, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_plain(part, where) for part in value]
    raise ValueError(f"{where} holds {value!r:.80}, a {type(value).__name__}, which JSON has not")


def _csv(file: IO[bytes], url: str) -> Iterator[RawRow]:
    """One row a record; cells are text, and one of calls, turns or tools that begins like a JSON list or object is read as one.

    Bytes that are not UTF-8 become lone surrogates, which no row may hold: its own row is rejected, not the file.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    taken: list[str] = []
    rows = csv.DictReader(_remembered(text, taken), strict=True)
    names = rows.fieldnames or []
    if len(set(names)) != len(names):
        raise DatasetNotFound(f"{url}: a column stands twice in the header: {names}")
    while True:
        taken.clear()
        begins = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            # The file is the caller's to close.
            text.detach()
            return
        except csv.Error as error:
            yield _not_csv(str(error), taken, url, begins)
            continue
        if None in row or None in row.values():
            num_cells = sum(cell is not None for name, cell in row.items() if name is not None) + len(row.get(None, ()))
            yield _not_csv(f"{num_cells} cells, and the header has {len(names)}", taken, url, begins)
            continue
        yield {column: _cell(cell) if column in _JSON_COLUMNS else cell for column, cell in row.items()}


def _remembered(lines: Iterable[str], taken: list[str]) -> Iterator[str]:
    for line in lines:
        taken.append(line)
        yield line


def _not_csv(problem: str, taken: list[str], url: str, begins: int) -> Unread:
    ends = begins + len(taken) - 1
    detail = f"line {begins}: {problem}"
    if len(taken) > 1:
        detail = (
            f"lines {begins} to {ends} are one record, since a quoted cell goes on until its quote is closed: {problem}; "
            f"close the quote in line {begins} if it was not meant to reach so far: none of these {len(taken)} lines is used"
        )
    text = "".join(taken)
    if len(text) <= MAX_ROW_BYTES:
        return Unread("not_csv", detail, text.rstrip("\r\n"))
    sha256 = hashlib.sha256(_encoded(text)).hexdigest()
    return Unread("not_csv", detail, place={"file": url, "first_line": begins, "last_line": ends, "sha256": sha256})


def _cell(text: str) -> Any:
    if not text.lstrip().startswith(("[", "{")):
        return text
    try:
        return STRICT.decode(text)
    except (ValueError, RecursionError):
        return text
