"""Reading calls out of text, never executing anything: strict readers by format, one lenient reader for all."""

import json
import re
from typing import Any

from tasks.contracts.conversation import Call
from tasks.contracts.prediction import Reading
from tasks.dataset.rendering.python_calls import read_python_calls
from tasks.dataset.rendering.strict_json import FORGIVING, STRICT

OPEN, CLOSE = "<tool_call>", "</tool_call>"
# Made once: json.dumps makes an encoder at every call that is not all defaults.
_encode = json.JSONEncoder(ensure_ascii=False).encode
JSON_WHITE_SPACE = re.compile(r"[ \t\n\r]*")

MAX_LENIENT_CHARACTERS = 20_000
MAX_LENIENT_STARTS = 200
"""An answer is searched up to here: no honest answer comes near it, and a hostile one must not cost minutes."""
MAX_DEPTH = 64
"""Of lists and objects inside of a call's arguments. What reads, copies and compares calls goes down level by level, and
Python's own limit lies at some hundreds."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a character: ``\\ud800`` is JSON, and no file can hold it."""
# What an untrained model puts around python-style calls.
FENCE = re.compile(r"```\w*|</?tool_calls?>")
PYTHON_CALL = re.compile(r"[A-Za-z_][\w.]*\s*\(")


def read_call(text: str, *, arguments_key: str) -> Call | str:
    """The call in a JSON object with exactly ``name`` and ``arguments_key``, or what is wrong with it."""
    try:
        value = STRICT.decode(text)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return as_call(value, arguments_key=arguments_key)


def write_call(call: Call, *, arguments_key: str = "arguments") -> str:
    """A call as the JSON object that :func:`read_call` reads."""
    return _encode({"name": call.name, arguments_key: call.arguments})


def as_call(value: Any, *, arguments_key: str) -> Call | str:
    """The call in a value that was read from JSON, or what is wrong with it."""
    if not isinstance(value, dict):
        return f"a call must be a JSON object, got {type(value).__name__}"
    # Before its keys are quoted: the words about them must be kept as well.
    if problem := _unusable(value):
        return problem
    if set(value) != {"name", arguments_key}:
        return f"a call has the keys name and {arguments_key}, got {', '.join(map(str, value)) or 'none'}"
    if not isinstance(value["name"], str) or not isinstance(value[arguments_key], dict):
        return f"name must be a string and {arguments_key} an object"
    return Call(value["name"], value[arguments_key])


def _unusable(value: Any) -> str | None:
    """Why a value from JSON cannot be kept, whatever it means; level by level, since a recursion could be made to fail."""
    level = [value]
    for _ in range(MAX_DEPTH + 2):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str) and not item.isascii() and SURROGATE.search(item):
                return "half of a character (a lone surrogate) in a text"
        if not below:
            return None
        level = below
    return f"arguments are nested deeper than {MAX_DEPTH}"


def read_tagged_calls(text: str) -> Reading:
    """Calls inside ``<tool_call>`` tags, and nothing but white space between them; no tag: an answer in words.

    A call ends where its JSON ends, so that a string among the arguments may hold the very tags.
    """
    if OPEN not in text and CLOSE not in text:
        return Reading(())
    calls: list[Call] = []
    # By hand, since a lazy regular expression takes quadratic time on a text of opening tags only.
    position = 0
    while (start := text.find(OPEN, position)) >= 0:
        if between := text[position:start].strip():
            return Reading((), f"text outside the <tool_call> tags: {between[:80]!r}")
        try:
            value, end = STRICT.raw_decode(text, _skip_white_space(text, start + len(OPEN)))
        except (ValueError, RecursionError) as error:
            return Reading((), f"not JSON: {error}")
        call = as_call(value, arguments_key="arguments")
        if isinstance(call, str):
            return Reading((), call)
        calls.append(call)
        end = _skip_white_space(text, end)
        if not text.startswith(CLOSE, end):
            return Reading((), f"a <tool_call> tag is not closed after its call: {text[end : end + 80]!r}")
        position = end + len(CLOSE)
    if rest := text[position:].strip():
        return Reading((), f"text outside the <tool_call> tags: {rest[:80]!r}")
    return Reading(tuple(calls))


def read_calls_by_line(text: str, *, arguments_key: str) -> Reading:
    """One JSON object a line and nothing else; text that does not begin with ``{``: an answer in words."""
    if not text.lstrip().startswith("{"):
        return Reading(())
    calls = []
    # Not splitlines: JSON escapes a line feed, but leaves U+2028 and its like inside of strings as they are.
    for line in filter(str.strip, text.split("\n")):
        call = read_call(line, arguments_key=arguments_key)
        if isinstance(call, str):
            return Reading((), call)
        calls.append(call)
    return Reading(tuple(calls))


def read_leniently(text: str) -> Reading:
    """Every JSON object in ``text`` that names a function, whatever surrounds it; where there is none, python-style calls.

    Forgives missing or other tags, fences, text before and after, ``parameters`` for ``arguments``, a list of calls, and
    ``[f(a=1), g(b="x")]``.
    """
    calls: list[Call] = []
    position = 0
    text = text[:MAX_LENIENT_CHARACTERS]
    for _ in range(MAX_LENIENT_STARTS):
        start = text.find("{", position)
        if start < 0:
            break
        try:
            value, position = FORGIVING.raw_decode(text, start)
        except (ValueError, RecursionError):
            position = start + 1
            continue
        key = "arguments" if "arguments" in value else "parameters"
        call = as_call({name: value[name] for name in ("name", key) if name in value}, arguments_key=key)
        if isinstance(call, Call):
            calls.append(call)
    return Reading(tuple(calls) or _python_calls(text))


def _python_calls(text: str) -> tuple[Call, ...]:
    """The calls in a text that is nothing but ``[f(a=1)]`` or ``f(a=1)``, fences and tags left out; else none."""
    text = FENCE.sub("", text).strip()
    if not text.endswith((")", ")]")):
        return ()
    if not text.startswith("["):
        text = f"[{text}]"
    if not PYTHON_CALL.match(text, 1):
        return ()
    try:
        calls = read_python_calls(text)
    except ValueError:
        return ()
    is_usable = all(PYTHON_CALL.fullmatch(f"{c.name}(") and not _unusable(dict(c.arguments)) for c in calls)
    return calls if is_usable else ()


def _skip_white_space(text: str, position: int) -> int:
    match = JSON_WHITE_SPACE.match(text, position)
    return match.end() if match else position
