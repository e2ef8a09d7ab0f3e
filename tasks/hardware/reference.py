"""Reference figures of chips and fabrics, read from ``reference.yaml``, where each stands with its source."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("reference.yaml")


@dataclass(frozen=True)
class Chip:
    """What a chip reaches: figures by name, in the unit that the name says."""

    name: str
    node_fabric: str
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Fabric:
    """What a fabric reaches.

    Attributes:
        curve: ``(message in bytes, busbw of all-reduce in GB/s)``, by size.
        curve_of_two: the same between two ranks, where it was measured: a small message takes as long among two as among
            four, of which the formula makes less busbw.
        adapters: of a node, that the curve is of; None: it does not depend on them.
        pair_gbytes_per_s: between two GPUs, one way; None: not known.
    """

    name: str
    title: str
    curve: tuple[tuple[int, float], ...]
    pair_gbytes_per_s: float | None
    source: str
    curve_of_two: tuple[tuple[int, float], ...] = ()
    adapters: int | None = None

    def all_reduce_gbytes_per_s(self, size_bytes: int, num_ranks: int) -> float | None:
        """The reference at a size, straight between points on a logarithmic scale; None below the first point."""
        curve = self.curve_of_two if num_ranks == 2 and self.curve_of_two else self.curve
        if not curve or size_bytes < curve[0][0]:
            return None
        for (low, at_low), (high, at_high) in pairwise(curve):
            if size_bytes <= high:
                share = math.log(size_bytes / low) / math.log(high / low)
                return at_low + share * (at_high - at_low)
        return curve[-1][1]


@cache
def _read() -> Mapping[str, Any]:
    values: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return values


def chips() -> tuple[str, ...]:
    """Names of all chips."""
    return tuple(_read()["chips"])


def fabrics() -> tuple[str, ...]:
    """Names of all fabrics."""
    return tuple(_read()["fabrics"])


def chip_of(device: str) -> Chip | None:
    """The chip that a device's own name (``NVIDIA H100 80GB HBM3``) or a chip's name tells; None: not among ours."""
    words = device.upper().replace("-", " ").split()
    for name, values in _read()["chips"].items():
        if any(match in words for match in values["match"]) and not set(words) & set(values.get("except", ())):
            figures = {key: float(entry["value"]) for key, entry in values["figures"].items()}
            return Chip(name, values["node_fabric"], figures)
    return None


def fabric_of(name: str) -> Fabric | None:
    """A fabric by its name; None: not among ours."""
    values = _read()["fabrics"].get(name)
    if values is None:
        return None
    curve, of_two = (
        tuple(sorted((int(size), float(value)) for size, value in values.get(name, {}).items()))
        for name in ("all_reduce_curve", "all_reduce_curve_of_two")
    )
    pair = values.get("pair_gbytes_per_s")
    pair = None if pair is None else float(pair)
    return Fabric(name, values["title"], curve, pair, values["source"], of_two, values.get("adapters"))
