"""Numbers in files, one or a list of them per row: appended in order, read one by one or in blocks.

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


class Column:
    """A number per row.

    Args:
        path: of a new file.
        dtype: of the numbers.
    """

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self._dtype = np.dtype(dtype)
        self._file = path.open("w+b")
        self._length = 0
        self._is_flushed = True

    def append(self, values: Array) -> None:
        """Append the numbers of some rows."""
        self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self._length += len(values)
        self._is_flushed = False

    def __len__(self) -> int:
        return self._length

    def read(self, first: int = 0, last: int | None = None) -> Array:
        """The numbers of the rows ``[first, last)``, or all; ``OSError`` where the file does not hold them any more."""
        if not self._is_flushed:
            self._file.flush()
            self._is_flushed = True
        size = self._dtype.itemsize
        count = (self._length if last is None else last) - first
        data = os.pread(self._file.fileno(), count * size, first * size)
        if len(data) != count * size:
            raise OSError(f"{self._file.name} holds {len(data)} of {count * size} bytes at {first * size}")
        return np.frombuffer(data, self._dtype)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Ragged:
    """``ragged[i]`` is row i's list.

    Args:
        path: of a new file; another of that name with ``-ends`` says where each list ends.
        dtype: of the numbers.
    """

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self._values = Column(path, dtype)
        self._ends = Column(path.with_name(f"{path.name}-ends"), np.int64)
        self._ends.append(np.zeros(1))

    def append(self, offsets: Array, values: Array) -> None:
        """Append some rows' lists as Arrow holds them: row i is ``values[offsets[i]:offsets[i + 1]]``."""
        end = len(self._values)
        self._values.append(values[offsets[0] : offsets[-1]])
        self._ends.append(offsets[1:].astype(np.int64) - int(offsets[0]) + end)

    @property
    def lengths(self) -> Array:
        """Numbers per row."""
        return np.diff(self._ends.read())

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> Array:
        start, end = self._ends.read(row, row + 2).tolist()
        return self._values.read(start, end)

    def blocks(self) -> Iterator[tuple[int, Array, Array]]:
        """``(first row, values, offsets into them)`` for runs of rows, in order."""
        for first in range(0, len(self), BLOCK_ROWS):
            offsets = self._ends.read(first, min(first + BLOCK_ROWS, len(self)) + 1)
            yield first, self._values.read(int(offsets[0]), int(offsets[-1])), offsets - offsets[0]

    def close(self) -> None:
        """Close the files."""
        self._values.close()
        self._ends.close()


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
    flat = np.concatenate([np.empty(0, dtype), *(np.asarray(entry, dtype) for entry in lists)])
    return pa.ListArray.from_arrays(offsets, pa.array(flat, type_))
