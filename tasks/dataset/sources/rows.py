"""What all source formats share: a row read into a conversation, or the reason why it cannot be used."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tasks.contracts.call_check import CallProblem, check_call, check_schema
from tasks.contracts.conversation import Call, Message, Tool
from tasks.dataset.sources.literals import Repairs, read_value

MAX_KEPT_CHARACTERS = 20_000
"""Of a text of tools that is kept for the next row."""


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


def read_tools(value: Any, repairs: Repairs) -> tuple[Tool, ...]:
    """Tool definitions from JSON text, a list, one object or nothing, with or without the OpenAI wrapper.

    Equal texts give the very same tools, which are never changed: most datasets repeat them from row to row.
    """
    if isinstance(value, str):
        # Long ones would fill the memory; they hardly recur.
        tools, used = (_tools_in_text if len(value) <= MAX_KEPT_CHARACTERS else _tools_in_text.__wrapped__)(value)
        repairs.update(used)
        return tools
    return _tools(value)


@lru_cache(maxsize=4096)
def _tools_in_text(text: str) -> tuple[tuple[Tool, ...], Repairs]:
    used: Repairs = Counter()
    return _tools(load(text, "bad_tools", used) if text.strip() else []), used


def _tools(value: Any) -> tuple[Tool, ...]:
    if value is None:
        value = []
    tools, names = [], set()
    for entry in value if isinstance(value, list) else [value]:
        tool = entry.get("function", entry) if isinstance(entry, Mapping) else None
        if not isinstance(tool, Mapping) or not isinstance(tool.get("name"), str) or not tool["name"].strip():
            raise RowRejected("bad_tools", f"not a tool definition: {str(entry)[:120]}")
        parameters = tool.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(parameters, Mapping):
            raise RowRejected("bad_tools", f"parameters of {tool['name']} are no schema: {str(parameters)[:120]}")
        try:
            check_schema(parameters)
        except (ValueError, RecursionError) as error:
            raise RowRejected("bad_tools", f"parameters of {tool['name']}: {error}") from error
        if tool["name"] in names:
            raise RowRejected("bad_tools", f"{tool['name']} is defined twice")
        names.add(tool["name"])
        description = tool.get("description") or ""
        if not isinstance(description, str):
            raise RowRejected("bad_tools", f"description of {tool['name']} is no text: {str(description)[:120]}")
        tools.append({"name": tool["name"], "description": description, "parameters": parameters})
    return tuple(tools)


def read_call(value: Any, repairs: Repairs) -> Call:
    """A call from ``{"name", "arguments"}``, whose arguments may be JSON text themselves."""
    if isinstance(value, str):
        value = load(value, "bad_call", repairs)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise RowRejected("bad_call", f"not a call: {str(value)[:120]}")
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):
        arguments = load(arguments, "bad_call", repairs) if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise RowRejected("bad_call", f"arguments of {value['name']} are no object: {str(arguments)[:120]}")
    return Call(value["name"], dict(arguments))


def load(text: str, reason: str, repairs: Repairs) -> Any:
    """The JSON value that a text means, repaired where that is documented; raises RowRejected with ``reason``."""
    try:
        return read_value(text, repairs)
    except ValueError as error:
        raise RowRejected(reason, str(error)) from error


def conversation(turns: Sequence[Message], tools: Sequence[Tool], repairs: Repairs) -> Conversation:
    """The turns up to the last answer, every call and the order of the turns checked.

    Raises:
        RowRejected: there is no request or no answer, turns contradict each other, or a call does not fit its tools.
    """
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        raise RowRejected("no_answer", "the assistant never answers")
    if not any(turn.role == "user" and turn.content.strip() for turn in turns[: answers[0]]):
        raise RowRejected("no_request", "the assistant answers before the user asks")
    last = answers[-1]
    if last + 1 < len(turns):
        repairs["turns_after_the_last_answer"] += 1
    _check_order(turns[: last + 1])
    for position in answers:
        if not turns[position].calls and not turns[position].content.strip():
            raise RowRejected("empty_answer", "an answer is empty")
        for call in turns[position].calls:
            try:
                check_call(call, tools)
            except CallProblem as problem:
                raise RowRejected(problem.code, problem.detail) from problem
    return Conversation(tuple(turns[:last]), tuple(tools), turns[last])


def _check_order(turns: Sequence[Message]) -> None:
    """Refuse turns that cannot follow each other."""
    previous: Message | None = None
    for turn in turns:
        follows_call = previous is not None and (previous.role == "tool" or bool(previous.calls))
        if turn.role == "tool" and not follows_call:
            raise RowRejected("contradictory_turns", f"a tool's result that no call asked for: {turn.content[:120]!r}")
        if turn.role == "assistant" and previous is not None and previous.role == "assistant":
            raise RowRejected("contradictory_turns", f"two answers in a row: {turn.content[:120]!r}")
        previous = turn
