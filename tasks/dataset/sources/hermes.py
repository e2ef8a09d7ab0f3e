"""hermes-function-calling-v1 (Apache-2.0).

A row, shortened::

    {"id": "85f4e3bd", "category": "IoT and Home Automation", "subcategory": "Thermostat Control", "task": "...",
     "tools": "[{\\"type\\": \\"function\\", \\"function\\": {\\"name\\": \\"set_temperature\\", ...}}]",
     "conversations": [{"from": "system", "value": "You are a function calling AI model. ..."},
                       {"from": "human", "value": "Set the living room to 21 degrees."},
                       {"from": "gpt", "value": "<tool_call>\\n{'name': 'set_temperature', 'arguments': ...}\\n</tool_call>"}]}

The system turn only repeats tools and format, which the model's own rendering writes anew, so it is left out.
"""

import re
from collections.abc import Mapping
from typing import Any

from tasks.contracts.conversation import Message
from tasks.dataset.sources.rows import (
    Conversation,
    RowRejected,
    conversation,
    read_call,
    read_tools,
    read_turns,
    role_and_text,
)

TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


def read(row: Mapping[str, Any]) -> Conversation:
    """The conversation in a row; raises RowRejected."""
    return conversation([turn for t in read_turns(row) if (turn := _turn(t)) is not None], read_tools(row.get("tools")))


def _turn(turn: Any) -> Message | None:
    role, text = role_and_text(turn)
    if role == "system":
        return None
    if role == "human":
        return Message("user", text)
    if role == "tool":
        return Message("tool", text)
    if role == "gpt":
        calls = tuple(read_call(body) for body in TOOL_CALL.findall(text))
        if not calls and "<tool_call>" in text:
            raise RowRejected("bad_call", f"an unclosed <tool_call>: {text[:120]!r}")
        return Message("assistant", "" if calls else text, calls)
    raise RowRejected("unknown_role", f"{role!r}")
