"""OpenAI's ``messages`` with ``tools``, the form that TRL's trainers read as well.

A row, shortened::

    {"tools": [{"type": "function", "function": {"name": "get_weather", "description": "...", "parameters": {...}}}],
     "messages": [{"role": "user", "content": "Is it warm in Oslo?"},
                  {"role": "assistant", "content": null, "tool_calls": [{"id": "call_1", "type": "function",
                      "function": {"name": "get_weather", "arguments": "{\\"place\\": \\"Oslo\\"}"}}]},
                  {"role": "tool", "tool_call_id": "call_1", "content": "{\\"celsius\\": 4}"},
                  {"role": "assistant", "content": "No, it is 4 degrees."}]}

Arguments are JSON text as OpenAI sends them, or an object as TRL wants them. ``tools`` may be JSON text.
"""

from collections.abc import Mapping
from typing import Any

from tasks.contracts.conversation import Message
from tasks.dataset.sources.literals import Repairs
from tasks.dataset.sources.rows import Conversation, RowRejected, conversation, read_call, read_tools, read_turns

ROLES = {"system": "system", "developer": "system", "user": "user", "tool": "tool", "function": "tool"}


def read(row: Mapping[str, Any], repairs: Repairs) -> Conversation:
    """The conversation in a row; raises RowRejected."""
    turns = [_turn(turn, repairs) for turn in read_turns(row, "messages")]
    return conversation(turns, read_tools(row.get("tools"), repairs), repairs)


def _turn(turn: Any, repairs: Repairs) -> Message:
    if not isinstance(turn, Mapping):
        raise RowRejected("bad_turn", f"not a message: {str(turn)[:120]}")
    role, content = turn.get("role"), _text(turn.get("content"))
    if role == "assistant":
        calls = turn.get("tool_calls") or []
        # The form before tools: one call, no list.
        calls = [turn["function_call"]] if not calls and turn.get("function_call") else calls
        if not isinstance(calls, list):
            raise RowRejected("bad_call", f"tool_calls is no list: {str(calls)[:120]}")
        read = tuple(read_call(c.get("function", c) if isinstance(c, Mapping) else c, repairs) for c in calls)
        if read and content.strip():
            repairs["words_beside_a_call"] += 1
        return Message("assistant", "" if read else content, read)
    if not isinstance(role, str) or role not in ROLES:
        raise RowRejected("unknown_role", f"{role!r}")
    return Message(ROLES[role], content)  # type: ignore[arg-type] # The values of ROLES are roles.


def _text(content: Any) -> str:
    """A message's text: a string, nothing, or a list of parts of which all must be text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    raise RowRejected("bad_turn", f"content is not text: {str(content)[:120]}")
