"""All usable rows in files: their texts in order, their tokens and keys at random."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tasks.dataset.convert import TEXTS
from tasks.dataset.features import NUM_BANDS
from tasks.dataset.ragged import Ragged
from tasks.dataset.split import OUT, SLICES, Keyed

KEYS_PER_ROW = ("tools_keys", "requests", "asked", "shingles", "word_runs")


class Tokens:
    """Token ids and the spans of the answers in them.

    Args:
        folder: where two files are made.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.ids = Ragged(folder / f"{name}-ids", np.int32)
        self.spans = Ragged(folder / f"{name}-spans", np.int32)

    def append(self, ids: pa.Array, spans: pa.Array) -> None:
        """Append the columns of some rows."""
        self.ids.append(ids)
        self.spans.append(spans)

    def close(self) -> None:
        """Close the files."""
        self.ids.close()
        self.spans.close()


class RowStore:
    """Rows as they were read; a context manager that closes its files.

    Args:
        folder: where the files are made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "texts.arrow"
        self._schema = pa.schema([(name, pa.string()) for name in TEXTS])
        self._sink = pa.OSFile(str(self._path), "wb")
        self._writer: Any = pa.ipc.new_stream(self._sink, self._schema)
        self._lists = {name: Ragged(folder / name, np.uint64) for name in KEYS_PER_ROW}
        self._numbers: dict[str, list[Any]] = {"source_index": [], "fixed": [], "opening": [], "exact": [], "bands": []}
        self._tokens: list[Tokens] = []
        self.tokens = self.new_tokens("read")
        self.ids: list[str] = []

    def __enter__(self) -> RowStore:
        return self

    def __exit__(self, *error: object) -> None:
        self._finish()
        for tokens in self._tokens:
            tokens.close()
        for ragged in self._lists.values():
            ragged.close()

    def __len__(self) -> int:
        return len(self.ids)

    def new_tokens(self, name: str) -> Tokens:
        """Tokens of rows made from these; closed with the store."""
        self._tokens.append(Tokens(self._folder, name))
        return self._tokens[-1]

    def add(self, batch: pa.RecordBatch) -> None:
        """Append a batch of :data:`tasks.dataset.convert.SCHEMA`."""
        self._writer.write_batch(batch.select(TEXTS))
        self.tokens.append(batch.column("input_ids"), batch.column("answer_spans"))
        for name, ragged in self._lists.items():
            ragged.append(batch.column(name))
        # Copies: the arrays would else keep the whole batch alive.
        for name in ("source_index", "opening", "exact"):
            self._numbers[name].append(batch.column(name).to_numpy().copy())
        self._numbers["bands"].append(batch.column("bands").flatten().to_numpy().reshape(-1, NUM_BANDS).copy())
        fixed = [SLICES.get(name, OUT) for name in batch.column("fixed_slice").to_pylist()]
        self._numbers["fixed"].append(np.array(fixed, np.int8))
        self.ids += batch.column("id").to_pylist()

    @property
    def keyed(self) -> Keyed:
        """The keys that the split works on."""
        numbers = {name: np.concatenate(parts) for name, parts in self._numbers.items()}
        lists = self._lists
        return Keyed(
            source=numbers["source_index"],
            fixed=numbers["fixed"],
            opening=numbers["opening"],
            exact=numbers["exact"],
            bands=numbers["bands"],
            tools=lists["tools_keys"],
            requests=lists["requests"],
            asked=lists["asked"],
            shingles=lists["shingles"],
            word_runs=lists["word_runs"],
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

    def _finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._sink.close()
            self._writer = None
