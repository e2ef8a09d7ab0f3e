"""Rows in files: nothing of them stays in memory, and what the split needs of each is little."""

import json
import os
import tracemalloc
from contextlib import closing

import numpy as np
import pyarrow as pa
import pytest

from tasks.contracts.settings import DatasetSettings
from tasks.dataset.benchmarks import Benchmarks
from tasks.dataset.convert import Converter
from tasks.dataset.ragged import Column, Ragged
from tasks.dataset.rendering.family import FAMILIES
from tasks.dataset.row_store import RowStore
from tasks.dataset.sources.read import Chunk
from tasks.dataset.split import choose
from tests.dataset.reading import BYTES
from tests.dataset.test_split import various_rows

NUM_ROWS, NUM_BATCHES = 400, 250


@pytest.fixture
def batch(tmp_path):
    BYTES.save(str(tmp_path / "tokenizer.json"))
    settings = DatasetSettings(sources=["rows.jsonl"])
    convert = Converter(settings, FAMILIES["smollm2"], tmp_path / "tokenizer.json")
    rows = [(f"rows-{n:06d}", json.dumps(row).encode()) for n, row in enumerate(various_rows(NUM_ROWS))]
    converted = convert(Chunk(0, "openai", rows))
    assert not converted.rejected
    return converted.batch


def test_a_hundred_thousand_rows_are_held_in_files_and_compared_in_little_memory(batch, tmp_path):
    settings = DatasetSettings(sources=["rows.jsonl"], num_unseen_tools_rows=10)
    nothing = Benchmarks(np.empty(0, np.uint64), np.empty(0, np.uint64))
    with RowStore(tmp_path) as store:
        store.add(batch)
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0], pa.total_allocated_bytes()
            for _ in range(NUM_BATCHES - 1):
                store.add(batch)
            num_rows = NUM_BATCHES * NUM_ROWS
            assert len(store) == num_rows
            grown = tracemalloc.get_traced_memory()[0] - before[0] + pa.total_allocated_bytes() - before[1]
            assert grown / num_rows < 1
            tracemalloc.reset_peak()
            choice = choose(store.keyed, settings, nothing)
            peak = tracemalloc.get_traced_memory()[1] - before[0]
            # Blocks of rows and the like are held as well, however many rows there are.
            assert peak / num_rows < 160
        finally:
            tracemalloc.stop()
        assert choice.counts["exact_duplicate"] >= num_rows - NUM_ROWS
        assert store.id_of(num_rows - 1) == f"rows-{NUM_ROWS - 1:06d}"
        assert store.tokens[num_rows - 1].tolist() == batch.column("tokens")[-1].as_py()


def test_a_file_that_lost_its_end_is_no_row_of_zeros(tmp_path):
    with closing(Column(tmp_path / "numbers", np.uint64)) as column:
        column.append(np.arange(10))
        assert column.read(2, 4).tolist() == [2, 3]
        os.truncate(tmp_path / "numbers", 40)
        with pytest.raises(OSError, match="40 of 80 bytes"):
            column.read()


def test_lists_are_read_between_appends_and_from_slices_of_columns(tmp_path):
    column = pa.array([[9], [1, 2], [], [3]], pa.list_(pa.int32()))[1:]
    with closing(Ragged(tmp_path / "lists", np.int32)) as ragged:
        for _ in range(2):
            ragged.append(column.offsets.to_numpy(), column.values.to_numpy())
            assert ragged[len(ragged) - 1].tolist() == [3]
        assert [ragged[row].tolist() for row in range(6)] == [[1, 2], [], [3]] * 2
        assert ragged.lengths.tolist() == [2, 0, 1] * 2
