"""xlam-function-calling-60k (CC-BY-4.0, gated on the hub): one request, one answer of calls.

A row, shortened::

    {"id": 0, "query": "Where can I find live giveaways for beta access?",
     "answers": "[{\\"name\\": \\"live_giveaways_by_type\\", \\"arguments\\": {\\"type\\": \\"beta\\"}}]",
     "tools": "[{\\"name\\": \\"live_giveaways_by_type\\", \\"description\\": \\"...\\", \\"parameters\\":
                {\\"type\\": {\\"description\\": \\"...\\", \\"type\\": \\"str, optional\\", \\"default\\": \\"game\\"}}}]"}

Parameters are flat, their types Python's: they become JSON Schemas here. A parameter is required unless its type says
``optional`` or it has a default.
"""

import re
from collections.abc import Mapping
from typing import Any

from tasks.contracts.conversation import Message
from tasks.dataset.sources.literals import Repairs
from tasks.dataset.sources.rows import Conversation, RowRejected, conversation, load, read_call, read_tools

TYPES = {
    "str": "string", "string": "string", "int": "integer", "integer": "integer", "float": "number", "number": "number",
    "bool": "boolean", "boolean": "boolean", "dict": "object", "object": "object", "list": "array", "array": "array",
    "tuple": "array", "set": "array",
}  # fmt: skip
OPTIONAL = re.compile(r",\s*optional\b.*$", re.IGNORECASE | re.DOTALL)
SEQUENCE = re.compile(r"^(list|tuple|set|array)\[(.*)\]$")


def read(row: Mapping[str, Any], repairs: Repairs) -> Conversation:
    """The conversation in a row; raises RowRejected."""
    query = row.get("query")
    if not isinstance(query, str) or not query.strip():
        raise RowRejected("no_request", "the column query is missing or empty")
    answers = _list(row.get("answers"), "bad_call", "answers", repairs)
    tools = [_tool(tool) for tool in _list(row.get("tools"), "bad_tools", "tools", repairs)]
    if not answers:
        raise RowRejected("no_answer", "the column answers holds no call, and the row no other answer")
    reply = Message("assistant", calls=tuple(read_call(answer, repairs) for answer in answers))
    return conversation([Message("user", query), reply], read_tools(tools, repairs), repairs)


def _list(value: Any, reason: str, column: str, repairs: Repairs) -> list[Any]:
    value = load(value, reason, repairs) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise RowRejected(reason, f"the column {column} is no list: {str(value)[:120]}")
    return value


def _tool(tool: Any) -> dict[str, Any]:
    parameters = tool.get("parameters") if isinstance(tool, Mapping) else None
    if not isinstance(parameters, Mapping) or not all(isinstance(p, Mapping) for p in parameters.values()):
        raise RowRejected("bad_tools", f"not a tool with flat parameters: {str(tool)[:120]}")
    properties, required = {}, []
    for name, parameter in parameters.items():
        type_, is_optional = OPTIONAL.subn("", str(parameter.get("type", "")).strip())
        properties[name] = schema_of(type_) | {
            key: parameter[key] for key in ("description", "default", "enum") if key in parameter
        }
        if not is_optional and "default" not in parameter and not type_.lower().startswith("optional["):
            required.append(name)
    return {**tool, "parameters": {"type": "object", "properties": properties, "required": required}}


def schema_of(python_type: str) -> dict[str, Any]:
    """JSON Schema of a type as Python writes it, as ``List[int]``; of one that is not known, anything."""
    text = python_type.strip().lower()
    if text.startswith("optional[") and text.endswith("]"):
        text = text[len("optional[") : -1].strip()
    if match := SEQUENCE.match(text):
        return {"type": "array", "items": schema_of(match.group(2))}
    name = TYPES.get(text.partition("[")[0])
    return {"type": name} if name else {}
