"""JSON to the letter: no key twice, no ``NaN``, no number that overflows; and a decoder that forgives the first."""

import json
import math
from collections import Counter
from typing import Any


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"keys that stand twice: {twice[:5]}")
    return value


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def finite(text: str) -> float:
    """The number in a text; raises ValueError if it is larger than any."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is larger than any number")
    return value


STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_float=finite)
"""Raises ValueError for what is not JSON, RecursionError for what is nested too deeply."""

FORGIVING = json.JSONDecoder(parse_constant=_refuse, parse_float=finite)
"""The same, but of keys that stand twice the last counts."""
