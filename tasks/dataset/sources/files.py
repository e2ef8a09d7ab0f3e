"""Rows of files: JSONL, JSON, Parquet and CSV, here or wherever fsspec reaches, one at a time.

A row that cannot be read is handed on with its reason. Nothing larger than a row is held in memory.
"""

import codecs
import csv
import io
import json
from collections.abc import Iterator, Mapping
from typing import IO, Any

import fsspec

from tasks.dataset.sources.literals import DECODER, strict_json
from tasks.dataset.sources.rows import RowRejected

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
MAX_ROW_BYTES = 8 << 20
"""A larger row is no conversation that any model could be taught, and is refused unread."""
MAX_WINDOW_CHARACTERS = 128 << 20
"""Of a JSON list; past this it is not searched for the end of a row."""
BLOCK_BYTES = 1 << 20
SHOWN = 120

RawRow = bytes | Mapping[str, Any] | RowRejected
"""A row as JSON text, as columns, or as the reason why it could not be read."""


class DatasetNotFound(ValueError):
    """The dataset of the settings is not there."""


class DatasetChanged(RuntimeError):
    """A file changed while it was read."""


def is_file_name(name: str) -> bool:
    """Whether a source's name means files rather than a dataset on the hub."""
    if "://" in name or name.startswith(("/", "./", "../", "~")) or name.endswith(SUFFIXES):
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
        found = sorted(p for p in files.find(path) if p.endswith(SUFFIXES))
    else:
        raise DatasetNotFound(
            f"dataset.sources={name!r}: there is no such file or folder ({path}); give a {', '.join(SUFFIXES)} file, a "
            "folder of them, a dataset id on the hub, or 'embedded'"
        )
    if not found:
        raise DatasetNotFound(f"dataset.sources={name!r}: the folder holds no {', '.join(SUFFIXES)} file")
    if not found[0].endswith(SUFFIXES):
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
        if path.endswith(".parquet"):
            yield from _parquet(file, url)
        elif path.endswith(".csv"):
            yield from _csv(file)
        elif path.endswith(".jsonl"):
            yield from _lines(file)
        else:
            yield from _array(file, url)
    files.invalidate_cache()
    if _stamp(files.info(path)) != before:
        raise DatasetChanged(f"{url} changed while it was read; copy it to where nobody writes and start again")


def parse(raw: RawRow) -> Mapping[str, Any]:
    """The row's columns; raises RowRejected."""
    if isinstance(raw, RowRejected):
        raise raw
    if isinstance(raw, Mapping):
        return raw
    try:
        row = strict_json(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RowRejected("not_utf8", f"{error.reason} at byte {error.start}: {raw[:SHOWN]!r}") from error
    except (ValueError, RecursionError) as error:
        raise RowRejected("not_json", f"{error}: {raw[:SHOWN]!r}") from error
    if not isinstance(row, Mapping):
        raise RowRejected("not_a_row", f"{raw[:SHOWN]!r}")
    return row


def _stamp(info: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(info.get(key) for key in ("size", "mtime", "ETag", "etag", "updated", "LastModified"))


def _lines(file: IO[bytes]) -> Iterator[RawRow]:
    while line := file.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            size = len(line)
            while rest := file.readline(MAX_ROW_BYTES):
                size += len(rest)
                if rest.endswith(b"\n"):
                    break
            yield _too_large(size, line)
        elif line.strip():
            yield line


def _too_large(size: int, beginning: bytes | str) -> RowRejected:
    return RowRejected(
        "row_too_large", f"{size / 1e6:.1f} MB, at most {MAX_ROW_BYTES / 1e6:.1f}: {beginning[:SHOWN]!r}"
    )


def _array(file: IO[bytes], url: str) -> Iterator[RawRow]:
    """The entries of a JSON list, of which at most one block and one row are in memory."""
    text = _Text(file, url)
    if text.skip_space() != "[":
        raise DatasetNotFound(f"{url} must hold a JSON list of rows; it begins with {text.rest[:40]!r}")
    text.advance(1)
    is_first = True
    while (sign := text.skip_space()) != "]":
        if not is_first:
            if sign != ",":
                raise DatasetNotFound(f"{url} is not JSON: a comma or ] is missing before {text.rest[:40]!r}")
            text.advance(1)
            text.skip_space()
        is_first = False
        yield text.value()


class _Text:
    """A window over a file's text."""

    def __init__(self, file: IO[bytes], url: str) -> None:
        self._file, self._url, self._is_complete = file, url, False
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape")
        self._position = 0
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
        self.rest = self.rest[self._position :] + self._decoder.decode(block, final=not block)
        self._position = 0
        return not self._is_complete

    def skip_space(self) -> str:
        """The next sign that is no white space, or '' at the end of the file, which is an error here."""
        while True:
            while self._position < len(self.rest) and self.rest[self._position].isspace():
                self._position += 1
            if self._position < len(self.rest):
                return self.rest[self._position]
            if not self._more():
                raise DatasetNotFound(f"{self._url} ends in the middle of its list: it is cut off")

    def advance(self, count: int) -> None:
        self._position += count

    def value(self) -> RawRow:
        """The next value; raises DatasetNotFound where the text is not JSON."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.rest, self._position)
            except (ValueError, RecursionError) as error:
                # Cut off by the window, or broken: only more text can tell.
                if self._more():
                    continue
                value, end = self._lenient(error)
            else:
                if end == len(self.rest) and self._more():
                    continue
            size = end - self._position
            self._position = end
            if isinstance(value, RowRejected):
                return value
            if size > MAX_ROW_BYTES:
                return _too_large(size, str(value))
            return value if isinstance(value, Mapping) else RowRejected("not_a_row", str(value)[:SHOWN])

    def _lenient(self, problem: Exception) -> tuple[Any, int]:
        """A row that is JSON but for duplicate keys, NaN or such is skipped with its reason; the list goes on."""
        try:
            _, end = json.JSONDecoder().raw_decode(self.rest, self._position)
        except (ValueError, RecursionError) as error:
            raise DatasetNotFound(f"{self._url} is not JSON: {error}") from error
        return RowRejected("not_json", f"{problem}: {self.rest[self._position : self._position + SHOWN]!r}"), end


def _parquet(file: IO[bytes], url: str) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise DatasetNotFound(f"{url} is not Parquet: {error}") from error


def _csv(file: IO[bytes]) -> Iterator[RawRow]:
    """One row a record; cells are text, and a cell that begins like a JSON list or object is read as one.

    Bytes that are not UTF-8 become lone surrogates, which no row may hold: its own row is rejected, not the file.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.DictReader(text, strict=True)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            # The file is the caller's to close.
            text.detach()
            return
        except csv.Error as error:
            yield RowRejected("not_csv", f"line {rows.line_num}: {error}")
            continue
        if None in row or None in row.values():
            yield RowRejected("not_csv", f"line {rows.line_num}: {len(row)} cells do not fit the header's columns")
            continue
        yield {column: _cell(text) for column, text in row.items()}


def _cell(text: str) -> Any:
    if not text.lstrip().startswith(("[", "{")):
        return text
    try:
        return strict_json(text)
    except (ValueError, RecursionError):
        return text
