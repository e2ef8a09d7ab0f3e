"""What the dataset stage leaves for the stages after it; imports nothing that only the preparation needs (ranks start faster)."""

from pathlib import Path

import pyarrow.parquet as pq

from tasks.contracts.conversation import Example, example_from_record

IGNORED = -100
"""Label of a token that the loss leaves out (PyTorch's cross-entropy default)."""


def read_examples(path: Path) -> list[Example]:
    """The examples in ``train.parquet`` or ``test.parquet``."""
    return [example_from_record(record) for record in pq.read_table(path).to_pylist()]
