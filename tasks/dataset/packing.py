"""Which conversations share a pack: best fit, longest first. Whole ones only, nothing is cut.

Best-fit decreasing: D. Johnson, Near-optimal bin packing algorithms, 1973. The fullest pack that still has room is found as
the lowest set bit of one integer whose bit *s* says that some pack has *s* tokens left.
"""

import numpy as np
import numpy.typing as npt


def pack(lengths: npt.ArrayLike, capacity: int) -> list[list[int]]:
    """Rows of each pack of at most ``capacity`` tokens; every row in exactly one.

    Raises:
        ValueError: a row is longer than a pack.
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and (longest := int(sizes.max())) > capacity:
        raise ValueError(
            f"row {int(sizes.argmax())} has {longest} tokens and a pack holds {capacity}; none is ever cut"
        )
    packs: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    # Stable, so that equal lengths keep their order and the packs depend on the lengths alone.
    for row in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[row])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, len(packs)
            packs.append([])
        packs[chosen].append(row)
        left = room - size
        if left:
            if not with_room[left]:
                rooms |= 1 << left
            with_room[left].append(chosen)
    return packs


def fill(lengths: npt.ArrayLike, num_packs: int, capacity: int) -> float:
    """Share of the packs' positions that hold a token."""
    return float(np.sum(lengths)) / (num_packs * capacity) if num_packs else 0.0
