"""ToolACE (Apache-2.0): tools as a JSON list inside the system text, calls as Python would write them.

A row, shortened::

    {"system": "You are an expert in composing functions. ... Here is a list of functions in JSON format that you can
         invoke:\\n[{\\"name\\": \\"Market Trends API\\", \\"description\\": \\"...\\", \\"parameters\\": {\\"type\\": \\"dict\\",
         \\"properties\\": {\\"trend_type\\": {\\"type\\": \\"string\\"}}, \\"required\\": [\\"trend_type\\"]}}]. \\nShould you
         decide to return the function call(s), ...",
     "conversations": [{"from": "user", "value": "Which indexes lead the market?"},
                       {"from": "assistant", "value": "[Market Trends API(trend_type=\\"MARKET_INDEXES\\")]"},
                       {"from": "tool", "value": "[{\\"name\\": \\"Market Trends API\\", \\"results\\": {...}}]"},
                       {"from": "assistant", "value": "The S&P 500 leads."}]}

Names hold spaces and signs, so a call is not Python as it stands: its name is read off, and its arguments are parsed as
literals. Nothing is evaluated. The types ``dict``, ``float`` and ``int`` become JSON Schema's.
"""

from collections.abc import Mapping
from typing import Any

from tasks.contracts.conversation import Call, Message
from tasks.dataset.rendering.python_calls import read_python_calls
from tasks.dataset.rendering.strict_json import STRICT
from tasks.dataset.sources.literals import Repairs
from tasks.dataset.sources.rows import Conversation, RowRejected, conversation, read_tools, read_turns, role_and_text

TYPES = {"dict": "object", "float": "number", "int": "integer", "list": "array", "tuple": "array", "bool": "boolean",
         "str": "string"}  # fmt: skip


def read(row: Mapping[str, Any], repairs: Repairs) -> Conversation:
    """The conversation in a row; raises RowRejected."""
    system, turns = row.get("system"), read_turns(row)
    if not isinstance(system, str):
        raise RowRejected(
            "bad_tools", f"the column system holds the tools and must be text, got {type(system).__name__}"
        )
    tools = read_tools(_standard(_tools(system)), repairs)
    names = {tool["name"] for tool in tools}
    return conversation([_turn(turn, names) for turn in turns], tools, repairs)


def _tools(system: str) -> Any:
    """The JSON list that the system text contains."""
    start = system.find("[{")
    if start < 0:
        return []
    try:
        return STRICT.raw_decode(system, start)[0]
    except (ValueError, RecursionError) as error:
        raise RowRejected("bad_tools", f"{error}: {system[start : start + 120]!r}") from error


def _standard(schema: Any) -> Any:
    """The same schema with JSON Schema's names of types."""
    if isinstance(schema, list):
        return [_standard(entry) for entry in schema]
    if not isinstance(schema, Mapping):
        return schema
    changed = {key: _standard(value) for key, value in schema.items()}
    if isinstance(changed.get("type"), str):
        changed["type"] = TYPES.get(changed["type"], changed["type"])
    return changed


def _turn(turn: Any, names: set[str]) -> Message:
    role, text = role_and_text(turn)
    text = text.strip()
    if role in ("user", "system", "tool"):
        return Message(role, text)
    if role != "assistant":
        raise RowRejected("unknown_role", f"{role!r}")
    # An answer in brackets that opens with no tool's name is words: "[1] see the list".
    is_call = text.startswith("[") and text.endswith("]") and ("(" in text)
    if is_call and (text[1:].partition("(")[0].strip() in names or text.endswith(")]")):
        return Message("assistant", calls=read_calls(text))
    return Message("assistant", text)


def read_calls(text: str) -> tuple[Call, ...]:
    """The calls in ``[Name one(a=1), Name two(b="x")]``.

    Raises:
        RowRejected: it is not closed, or an argument is no literal.
    """
    try:
        return read_python_calls(text)
    except ValueError as error:
        raise RowRejected("bad_call", str(error)) from error
