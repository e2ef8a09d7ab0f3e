"""The Berkeley Function-Calling Leaderboard's single-turn Python categories, from the installed package bfcl-eval (Apache-2.0).

A row and its answer, shortened::

    {"id": "parallel_0", "question": [[{"role": "user", "content": "Play songs from Taylor Swift and Maroon 5, ..."}]],
     "function": [{"name": "spotify.play", "description": "...", "parameters": {"type": "dict", "properties":
         {"artist": {"type": "string"}, "duration": {"type": "integer"}}, "required": ["artist", "duration"]}}]}
    {"id": "parallel_0", "ground_truth": [{"spotify.play": {"artist": ["Taylor Swift"], "duration": [20]}}, ...]}

Each parameter has a list of allowed values; ``""`` among them: it may be left out, unless the schema requires it.
Irrelevance rows want no call, relevance rows any call.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.contracts.conversation import Call, Example, Message

PACKAGE = "bfcl_eval"
CATEGORIES = (
    "simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance", "live_simple", "live_multiple",
    "live_parallel", "live_parallel_multiple", "live_irrelevance", "live_relevance",
)  # fmt: skip
TYPES = {"dict": "object", "float": "number", "tuple": "array"}
PREFIX = "bfcl:"
"""Of the rows' ids, so that no test row of a dataset has the same."""


class BfclNotInstalled(ValueError):
    """The package that carries the questions is missing."""


@dataclass(frozen=True)
class BfclRow:
    """One question.

    Attributes:
        functions: as the benchmark writes them, for its own checker.
        ground_truth: allowed values, ``[{function: {parameter: [value, ...]}}, ...]``; None where no certain call is expected.
    """

    category: str
    example: Example
    functions: Sequence[Mapping[str, Any]]
    ground_truth: Sequence[Mapping[str, Mapping[str, Sequence[Any]]]] | None

    @property
    def wants_a_call(self) -> bool:
        """Any call at all is right, as far as the benchmark can tell."""
        return self.category == "live_relevance"


def read_bfcl(rows_per_category: int | None = None) -> list[BfclRow]:
    """The questions; of each category all, or so many spread evenly over it.

    Raises:
        BfclNotInstalled: the package is not there.
    """
    data = find_bfcl()
    found: list[BfclRow] = []
    for category in CATEGORIES:
        rows = _lines(data / f"BFCL_v4_{category}.json")
        answers = data / "possible_answer" / f"BFCL_v4_{category}.json"
        truth = {row["id"]: row["ground_truth"] for row in _lines(answers)} if answers.exists() else {}
        step = max(1, len(rows) // rows_per_category) if rows_per_category else 1
        found += [_row(category, row, truth.get(row["id"])) for row in rows[::step][:rows_per_category]]
    return found


def find_bfcl() -> Path:
    """The folder with the questions.

    Raises:
        BfclNotInstalled: the package is not there.
    """
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise BfclNotInstalled(
            "inference.suites: bfcl asks the questions in the package bfcl-eval, which is not installed here; "
            "pip install --no-deps bfcl-eval"
        )
    return Path(package.origin).parent / "data"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def _row(category: str, row: Mapping[str, Any], truth: Any) -> BfclRow:
    messages = tuple(Message(message["role"], message["content"]) for message in row["question"][0])
    tools = tuple(
        {"name": f["name"], "description": f.get("description", ""), "parameters": json_schema(f["parameters"])}
        for f in row["function"]
    )
    required = {f["name"]: set(f["parameters"].get("required", ())) for f in row["function"]}
    example = Example(
        id=PREFIX + row["id"],
        messages=messages,
        tools=tools,
        expected=_reference(truth or [], required),
        answer="No function fits.",
        source="bfcl",
        slice="suite",
    )
    return BfclRow(category, example, row["function"], truth)


def json_schema(schema: Any) -> Any:
    """The same schema with JSON Schema's names of types; ``any`` is no type but the lack of one."""
    if isinstance(schema, list):
        return [json_schema(entry) for entry in schema]
    if not isinstance(schema, Mapping):
        return schema
    changed = {key: json_schema(value) for key, value in schema.items()}
    if isinstance(kind := changed.get("type"), str):
        if kind == "any":
            del changed["type"]
        else:
            changed["type"] = TYPES.get(kind, kind)
    return changed


def _reference(
    truth: Sequence[Mapping[str, Mapping[str, Sequence[Any]]]], required: Mapping[str, set[str]]
) -> tuple[Call, ...]:
    """The calls with the first value allowed of each parameter, without those that may be left out."""
    return tuple(
        Call(
            name,
            {
                p: _first(values)
                for p, values in allowed.items()
                if values and ("" not in values or p in required[name])
            },
        )
        for entry in truth
        for name, allowed in entry.items()
    )


def _first(values: Sequence[Any]) -> Any:
    return _plain(next((value for value in values if value != ""), ""))


def _plain(value: Any) -> Any:
    """A value as a call has it: of the lists of allowed values in an object, the first of each."""
    if isinstance(value, Mapping):
        return {
            k: _first(v) if isinstance(v, list) else v
            for k, v in value.items()
            if not (isinstance(v, list) and "" in v)
        }
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return [_plain(item) for item in value]
    return value
