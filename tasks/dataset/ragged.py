"""Lists of numbers, one per row, in a file: appended in order, read one by one or in blocks.

Read with ``pread`` instead of mapped: pages of a map count as this process's memory, and a million rows fill it.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Array = npt.NDArray[Any]
BLOCK_ROWS = 4096
DTYPES = {pa.int32(): np.int32, pa.uint64(): np.uint64}


class Ragged:
    """``ragged[i]`` is row i's list.

    Args:
        path: of a new file.
        dtype: of the numbers.
    """

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self._dtype = np.dtype(dtype)
        self._file = path.open("w+b", buffering=1 << 20)
        self._offsets = [np.zeros(1, np.int64)]
        self._end = 0
        self._starts: Array | None = None

    def append(self, column: pa.Array) -> None:
        """Append a batch's column of lists."""
        # A slice of a batch begins anywhere in its buffers.
        offsets = column.offsets.to_numpy().astype(np.int64)
        values = column.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
        self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self._offsets.append(offsets[1:] - offsets[0] + self._end)
        self._end += int(offsets[-1] - offsets[0])
        self._starts = None

    @property
    def offsets(self) -> Array:
        """``n + 1`` positions: row i is ``[offsets[i], offsets[i + 1])``."""
        if self._starts is None:
            self._file.flush()
            self._starts = np.concatenate(self._offsets)
            self._offsets = [self._starts]
        return self._starts

    @property
    def lengths(self) -> Array:
        """Numbers per row."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Array:
        offsets = self.offsets
        return self._read(int(offsets[row]), int(offsets[row + 1]))

    def blocks(self) -> Iterator[tuple[int, Array, Array]]:
        """``(first row, values, offsets into them)`` for runs of rows, in order."""
        offsets = self.offsets
        for first in range(0, len(self), BLOCK_ROWS):
            last = min(first + BLOCK_ROWS, len(self))
            yield first, self._read(int(offsets[first]), int(offsets[last])), offsets[first : last + 1] - offsets[first]

    def _read(self, start: int, end: int) -> Array:
        size = self._dtype.itemsize
        data = os.pread(self._file.fileno(), (end - start) * size, start * size)
        return np.frombuffer(data, self._dtype)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def any_in(values: Array, offsets: Array, wanted: Array) -> npt.NDArray[np.bool_]:
    """For each row of a block whether any of its numbers is in ``wanted``."""
    counts = np.concatenate([[0], np.cumsum(np.isin(values, wanted))])
    found: npt.NDArray[np.bool_] = counts[offsets[1:]] > counts[offsets[:-1]]
    return found


def ragged_column(lists: Sequence[Sequence[int] | Array], type_: pa.DataType) -> pa.ListArray:
    """Lists as a column, by way of one flat array: several times faster than list by list."""
    dtype = DTYPES[type_]
    offsets = np.zeros(len(lists) + 1, np.int32)
    np.cumsum([len(entry) for entry in lists], out=offsets[1:])
    flat = np.empty(offsets[-1], dtype)
    for entry, start, end in zip(lists, offsets, offsets[1:], strict=False):
        flat[start:end] = entry
    return pa.ListArray.from_arrays(offsets, pa.array(flat, type_))
