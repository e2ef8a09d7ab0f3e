"""What all source formats share: a row read into a conversation, or the reason why it cannot be used."""

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jsonschema
import referencing

from tasks.contracts.conversation import Call, Message, Tool


class RowRejected(ValueError):
    """A row that cannot be used; ``reason`` is the code that counts are kept by."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row up to its last answer."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    reply: Message


def read_turns(row: Mapping[str, Any], column: str = "conversations") -> list[Any]:
    """The turns of a row, whatever they are.

    Raises:
        RowRejected: the column is no list or holds none.
    """
    turns = row.get(column)
    if not isinstance(turns, list) or not turns:
        raise RowRejected("no_conversation", f"the column {column} is missing, empty or no list")
    return turns


def role_and_text(turn: Any) -> tuple[Any, str]:
    """A turn ``{"from", "value"}``; raises RowRejected if it is none."""
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
        raise RowRejected("bad_turn", f"not a turn: {str(turn)[:120]}")
    return turn.get("from"), turn["value"]


def read_tools(value: Any) -> tuple[Tool, ...]:
    """Tool definitions from JSON text, a list, one object or nothing, with or without the OpenAI wrapper."""
    if isinstance(value, str):
        value = load_json(value, "bad_tools") if value.strip() else []
    if value is None:
        value = []
    tools = []
    for entry in value if isinstance(value, list) else [value]:
        tool = entry.get("function", entry) if isinstance(entry, Mapping) else None
        if not isinstance(tool, Mapping) or not isinstance(tool.get("name"), str):
            raise RowRejected("bad_tools", f"not a tool definition: {str(entry)[:120]}")
        parameters = tool.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(parameters, Mapping):
            raise RowRejected("bad_tools", f"parameters of {tool['name']} are no schema: {str(parameters)[:120]}")
        tools.append({"name": tool["name"], "description": tool.get("description", ""), "parameters": parameters})
    return tuple(tools)


def read_call(value: Any) -> Call:
    """A call from ``{"name", "arguments"}``, whose arguments may be JSON text themselves."""
    if isinstance(value, str):
        value = load_json(value, "bad_call")
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise RowRejected("bad_call", f"not a call: {str(value)[:120]}")
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):
        arguments = load_json(arguments, "bad_call") if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise RowRejected("bad_call", f"arguments of {value['name']} are no object: {str(arguments)[:120]}")
    return Call(value["name"], dict(arguments))


def load_json(text: str, reason: str) -> Any:
    """JSON, or else a Python literal (some published rows are); never evaluated."""
    try:
        return json.loads(text)
    except ValueError as error:
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            raise RowRejected(reason, f"neither JSON nor a literal ({error}): {text[:120]!r}") from error


def conversation(turns: Sequence[Message], tools: Sequence[Tool]) -> Conversation:
    """The turns up to the last answer, every call checked.

    Raises:
        RowRejected: there is no request or no answer, or a call does not fit the tools on offer.
    """
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        raise RowRejected("no_answer", "the assistant never answers")
    if not any(turn.role == "user" and turn.content.strip() for turn in turns[: answers[0]]):
        raise RowRejected("no_request", "the assistant answers before the user asks")
    for position in answers:
        if not turns[position].calls and not turns[position].content.strip():
            raise RowRejected("empty_answer", "an answer is empty")
        for call in turns[position].calls:
            check_call(call, tools)
    last = answers[-1]
    return Conversation(tuple(turns[:last]), tuple(tools), turns[last])


def check_call(call: Call, tools: Sequence[Tool]) -> None:
    """Refuse a call to a tool that is not offered or with arguments that its schema refuses."""
    tool = next((tool for tool in tools if tool["name"] == call.name), None)
    if tool is None:
        raise RowRejected("undeclared_tool", f"{call.name} is not among {[t['name'] for t in tools]}")
    schema = tool["parameters"]
    if unknown := set(call.arguments) - set(schema.get("properties", {})):
        raise RowRejected("unknown_argument", f"{call.name} has no parameter {sorted(unknown)}")
    try:
        # A registry that knows nothing: a remote "$ref" is an error, never a download.
        jsonschema.Draft202012Validator(schema, registry=referencing.Registry()).validate(dict(call.arguments))
    except jsonschema.ValidationError as error:
        raise RowRejected("schema_mismatch", f"{call.name}: {error.message[:200]}") from error
    except Exception as error:  # A broken schema fails in many ways inside the library; each is this row's fault.
        raise RowRejected("bad_tools", f"schema of {call.name}: {type(error).__name__}: {str(error)[:200]}") from error
