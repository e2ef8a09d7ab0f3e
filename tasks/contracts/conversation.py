"""What a conversation is, once a source row has been read: messages, tools, and the calls that are expected."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tasks.contracts.by_identity import by_identity

Tool = Mapping[str, Any]
"""``{"name": str, "description": str, "parameters": JSON Schema of an object}``."""

Category = Literal["one_call", "several_tools", "parallel_calls", "no_fitting_tool"]
CATEGORIES: tuple[Category, ...] = ("one_call", "several_tools", "parallel_calls", "no_fitting_tool")

# Made once: json.dumps makes an encoder at every call that is not all defaults.
_encode = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True, slots=True)
class Call:
    """One function call."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. An assistant's turn has either ``content`` or ``calls``; a tool's result is its ``content``."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """A request with the tools on offer and the answer that is expected.

    ``messages`` ends before the expected answer; ``expected`` is empty where the right answer makes no call, and
    ``answer`` then holds the words that training teaches. Earlier answers among the messages are taught as well.
    """

    id: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    expected: tuple[Call, ...]
    answer: str
    source: str
    slice: Literal["train", "test", "unseen_tools", "suite"]

    @property
    def category(self) -> Category:
        """Read off the structure, so that it means the same for every source."""
        if not self.expected:
            return "no_fitting_tool"
        if len(self.expected) > 1:
            return "parallel_calls"
        return "several_tools" if len(self.tools) > 1 else "one_call"

    @property
    def request(self) -> str:
        """The user's last words."""
        return next((m.content for m in reversed(self.messages) if m.role == "user"), "")

    @property
    def reply(self) -> Message:
        """The expected answer as a message."""
        return Message("assistant", content="" if self.expected else self.answer, calls=self.expected)


def calls_in(example: Example) -> list[tuple[Call, ...]]:
    """The calls of each answer that makes any, the last one included."""
    return [turn.calls for turn in (*example.messages, example.reply) if turn.calls]


def cut_at_first_call(example: Example) -> Example:
    """The same conversation up to its first answer that makes a call, or else its first answer: what a test asks."""
    return cut_at_calls(example)[0]


def cut_at_calls(example: Example) -> list[Example]:
    """The conversation once up to each answer that makes a call, or up to its first answer where none does.

    All but the first have the number of their call turn added to the id.
    """
    turns = [*example.messages, example.reply]
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    positions = [i for i in answers if turns[i].calls] or answers[:1]
    return [
        Example(
            id=example.id if number == 0 else f"{example.id}.{number + 1}",
            messages=tuple(turns[:position]),
            tools=example.tools,
            expected=turns[position].calls,
            answer=turns[position].content,
            source=example.source,
            slice=example.slice,
        )
        for number, position in enumerate(positions)
    ]


def calls_to_json(calls: Sequence[Call]) -> str:
    """``[{"name": ..., "arguments": {...}}, ...]`` as text."""
    return _encode(_plain(calls))


def _plain(calls: Sequence[Call]) -> list[dict[str, Any]]:
    return [{"name": call.name, "arguments": call.arguments} for call in calls]


def calls_from_json(text: str) -> tuple[Call, ...]:
    """The inverse of :func:`calls_to_json`."""
    return tuple(Call(call["name"], call["arguments"]) for call in json.loads(text))


def tools_in(text: str) -> tuple[Tool, ...]:
    """The tools in a record's column."""
    return tuple(json.loads(text))


@by_identity
def _tools_text(tools: tuple[Tool, ...]) -> str:
    return _encode(list(tools))


def example_to_record(example: Example) -> dict[str, str]:
    """A flat record of text columns, for Parquet."""
    messages = [{"role": m.role, "content": m.content, "calls": _plain(m.calls)} for m in example.messages]
    return {
        "id": example.id,
        "messages": _encode(messages),
        "tools": _tools_text(example.tools),
        "expected": calls_to_json(example.expected),
        "answer": example.answer,
        "source": example.source,
        "slice": example.slice,
        "category": example.category,
    }


def example_from_record(record: Mapping[str, Any]) -> Example:
    """The inverse of :func:`example_to_record`."""
    messages = tuple(
        Message(m["role"], m["content"], tuple(Call(c["name"], c["arguments"]) for c in m["calls"]))
        for m in json.loads(record["messages"])
    )
    return Example(
        id=record["id"],
        messages=messages,
        tools=tools_in(record["tools"]),
        expected=calls_from_json(record["expected"]),
        answer=record["answer"],
        source=record["source"],
        slice=record["slice"],
    )
