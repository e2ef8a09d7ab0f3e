"""hermes-function-calling-v1 (Apache-2.0).

A row, shortened::

    {"id": "85f4e3bd", "category": "IoT and Home Automation", "subcategory": "Thermostat Control", "task": "...",
     "tools": "[{\\"type\\": \\"function\\", \\"function\\": {\\"name\\": \\"set_temperature\\", ...}}]",
     "conversations": [{"from": "system", "value": "You are a function calling AI model. ..."},
                       {"from": "human", "value": "Set the living room to 21 degrees."},
                       {"from": "gpt", "value": "<tool_call>\\n{'name': 'set_temperature', 'arguments': ...}\\n</tool_call>"}]}

The system turn only repeats tools and format, which the model's own rendering writes anew, so it is left out.
"""

from collections.abc import Mapping
from typing import Any

from tasks.contracts.conversation import Message
from tasks.dataset.sources.literals import Repairs
from tasks.dataset.sources.rows import (
    Conversation,
    RowRejected,
    conversation,
    read_call,
    read_tools,
    read_turns,
    role_and_text,
)

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def read(row: Mapping[str, Any], repairs: Repairs) -> Conversation:
    """The conversation in a row; raises RowRejected."""
    turns = [turn for t in read_turns(row) if (turn := _turn(t, repairs)) is not None]
    return conversation(turns, read_tools(row.get("tools"), repairs), repairs)


def _turn(turn: Any, repairs: Repairs) -> Message | None:
    role, text = role_and_text(turn)
    if role == "system":
        return None
    if role == "human":
        return Message("user", text)
    if role == "tool":
        return Message("tool", text)
    if role == "gpt":
        bodies, words = _inside_tags(text)
        if not bodies:
            return Message("assistant", text)
        if words.strip():
            repairs["words_beside_a_call"] += 1
        return Message("assistant", calls=tuple(read_call(body, repairs) for body in bodies))
    raise RowRejected("unknown_role", f"{role!r}")


def _inside_tags(text: str) -> tuple[list[str], str]:
    """What stands inside the tags, and everything else; in linear time, whatever the text."""
    bodies, words, position = [], [], 0
    while (start := text.find(OPEN, position)) >= 0:
        end = text.find(CLOSE, start)
        if end < 0:
            raise RowRejected("bad_call", f"an unclosed {OPEN}: {text[start : start + 120]!r}")
        words.append(text[position:start])
        bodies.append(text[start + len(OPEN) : end])
        position = end + len(CLOSE)
    return bodies, "".join([*words, text[position:]])
