"""ShareGPT with tools, as LLaMA-Factory's ``glaive_toolcall_en_demo.json`` (Apache-2.0).

A row, shortened::

    {"conversations": [{"from": "human", "value": "How much is 5000 USD in EUR?"},
                       {"from": "function_call", "value": "{\\"name\\": \\"convert\\", \\"arguments\\": {...}}"},
                       {"from": "observation", "value": "{\\"amount\\": 4250.5}"},
                       {"from": "gpt", "value": "5000 USD are 4250.50 EUR."}],
     "tools": "[{\\"name\\": \\"convert\\", \\"description\\": \\"...\\", \\"parameters\\": {...}}]"}
"""

from collections.abc import Mapping
from typing import Any

from tasks.contracts.conversation import Message
from tasks.dataset.sources.literals import Repairs
from tasks.dataset.sources.rows import (
    Conversation,
    RowRejected,
    conversation,
    load,
    read_call,
    read_tools,
    read_turns,
    role_and_text,
)


def read(row: Mapping[str, Any], repairs: Repairs) -> Conversation:
    """The conversation in a row; raises RowRejected."""
    turns = [_turn(turn, repairs) for turn in read_turns(row)]
    # LLaMA-Factory keeps the system message in a column of its own.
    if isinstance(system := row.get("system"), str) and system.strip():
        turns.insert(0, Message("system", system))
    return conversation(turns, read_tools(row.get("tools"), repairs), repairs)


def _turn(turn: Any, repairs: Repairs) -> Message:
    role, text = role_and_text(turn)
    if role == "system":
        return Message("system", text)
    if role == "human":
        return Message("user", text)
    if role == "observation":
        return Message("tool", text)
    if role == "gpt":
        return Message("assistant", text)
    if role == "function_call":
        value = load(text, "bad_call", repairs)
        calls = value if isinstance(value, list) else [value]
        return Message("assistant", calls=tuple(read_call(call, repairs) for call in calls))
    raise RowRejected("unknown_role", f"{role!r}")
