"""Reading calls out of text, never executing anything: one strict reader, one lenient reader."""

import json
from typing import Any

from tasks.contracts.conversation import Call
from tasks.contracts.prediction import Reading

MAX_LENIENT_CHARACTERS = 20_000
MAX_LENIENT_STARTS = 200
"""An answer is searched up to here: no honest answer comes near it, and a hostile one must not cost minutes."""


def read_call(text: str, *, arguments_key: str) -> Call | str:
    """The call in a JSON object with exactly ``name`` and ``arguments_key``, or what is wrong with it."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if not isinstance(value, dict):
        return f"a call must be a JSON object, got {type(value).__name__}"
    if set(value) != {"name", arguments_key}:
        return f"a call has the keys name and {arguments_key}, got {', '.join(map(str, value)) or 'none'}"
    if not isinstance(value["name"], str) or not isinstance(value[arguments_key], dict):
        return f"name must be a string and {arguments_key} an object"
    return Call(value["name"], value[arguments_key])


def read_leniently(text: str) -> Reading:
    """Every JSON object in ``text`` that names a function, whatever surrounds it.

    Forgives missing or other tags, text before and after, ``parameters`` for ``arguments``, and a list of calls.
    """
    decoder = json.JSONDecoder()
    calls: list[Call] = []
    position = 0
    text = text[:MAX_LENIENT_CHARACTERS]
    for _ in range(MAX_LENIENT_STARTS):
        start = text.find("{", position)
        if start < 0:
            break
        try:
            value, position = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            position = start + 1
            continue
        name = value.get("name")
        arguments = value.get("arguments", value.get("parameters"))
        if isinstance(name, str) and isinstance(arguments, dict):
            calls.append(Call(name, arguments))
    return Reading(tuple(calls))


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"duplicate keys in {keys}")
    return dict(pairs)
