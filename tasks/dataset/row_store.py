"""All usable rows in files: their texts in order, their tokens and keys at random. Nothing of them stays in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.dataset.convert import TEXTS
from tasks.dataset.features import NUM_BANDS
from tasks.dataset.ragged import Column, Ragged
from tasks.dataset.split import OUT, SLICES, Keyed

LISTS_PER_ROW = ("tools_keys", "requests", "asked", "shingles", "word_runs")
NUMBERS_PER_ROW = {"source_index": np.int16, "opening": np.uint64, "exact": np.uint64, "offered": np.uint64}


class RowStore:
    """Rows as they were read; a context manager that closes its files.

    Args:
        folder: where the files are made.

    Attributes:
        tokens: token ids, marked as :class:`tasks.dataset.rendering.encode.Encoder` marks them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "texts.arrow"
        self._schema = pa.schema([(name, pa.string()) for name in TEXTS])
        self._sink = pa.OSFile(str(self._path), "wb")
        self._writer: Any = pa.ipc.new_stream(self._sink, self._schema)
        self._open: list[Column | Ragged] = []
        self._lists = {name: self._ragged(name, np.uint64) for name in LISTS_PER_ROW}
        self._numbers = {name: self._column(name, dtype) for name, dtype in NUMBERS_PER_ROW.items()}
        self._fixed = self._column("fixed", np.int8)
        self._bands = [self._column(f"band-{number}", np.uint64) for number in range(NUM_BANDS)]
        self._ids = self._ragged("ids", np.uint8)
        self.tokens = self.new_tokens("read")

    def __enter__(self) -> RowStore:
        return self

    def __exit__(self, *error: object) -> None:
        self._finish()
        for file in self._open:
            file.close()

    def __len__(self) -> int:
        return len(self._ids)

    def new_tokens(self, name: str) -> Ragged:
        """Token ids of rows made from these; closed with the store."""
        return self._ragged(f"tokens-{name}", np.int32)

    def id_of(self, row: int) -> str:
        """The id of a row."""
        return self._ids[row].tobytes().decode()

    def add(self, batch: pa.RecordBatch) -> None:
        """Append a batch of :data:`tasks.dataset.convert.SCHEMA`."""
        self._writer.write_batch(batch.select(TEXTS))
        append_lists(self.tokens, batch.column("tokens"))
        for name, ragged in self._lists.items():
            append_lists(ragged, batch.column(name))
        for name, column in self._numbers.items():
            column.append(batch.column(name).to_numpy())
        bands = batch.column("bands").flatten().to_numpy().reshape(-1, NUM_BANDS)
        for column, keys in zip(self._bands, bands.T, strict=True):
            column.append(keys)
        fixed = [SLICES.get(name, OUT) for name in batch.column("fixed_slice").to_pylist()]
        self._fixed.append(np.array(fixed, np.int8))
        ids = [np.frombuffer(text.encode(), np.uint8) for text in batch.column("id").to_pylist()]
        self._ids.append(np.cumsum([0, *map(len, ids)]), np.concatenate([np.empty(0, np.uint8), *ids]))

    @property
    def keyed(self) -> Keyed:
        """The keys that the split works on."""
        return Keyed(
            source=self._numbers["source_index"],
            fixed=self._fixed,
            opening=self._numbers["opening"],
            exact=self._numbers["exact"],
            offered=self._numbers["offered"],
            bands=self._bands,
            tools=self._lists["tools_keys"],
            requests=self._lists["requests"],
            asked=self._lists["asked"],
            shingles=self._lists["shingles"],
            word_runs=self._lists["word_runs"],
        )

    def texts(self, chosen: np.ndarray) -> Iterator[pa.RecordBatch]:
        """The text columns of the chosen rows, a few hundred rows at a time, in the order of reading.

        Args:
            chosen: one truth value per row.
        """
        self._finish()
        first = 0
        with pa.OSFile(str(self._path)) as source:
            for batch in pa.ipc.open_stream(source):
                rows = batch.filter(pa.array(chosen[first : first + len(batch)]))
                first += len(batch)
                if len(rows):
                    yield rows

    def _column(self, name: str, dtype: npt.DTypeLike) -> Column:
        column = Column(self._folder / name, dtype)
        self._open.append(column)
        return column

    def _ragged(self, name: str, dtype: npt.DTypeLike) -> Ragged:
        ragged = Ragged(self._folder / name, dtype)
        self._open.append(ragged)
        return ragged

    def _finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._sink.close()
            self._writer = None


def append_lists(ragged: Ragged, column: pa.ListArray) -> None:
    """Append a batch's column of lists."""
    ragged.append(column.offsets.to_numpy(), column.values.to_numpy())
