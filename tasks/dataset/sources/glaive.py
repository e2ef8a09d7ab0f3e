"""glaive-function-calling-v2 (Apache-2.0), raw ``chat`` strings.

A row, shortened::

    {"system": "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\\n{\\n
        \\"name\\": \\"get_exchange_rate\\", \\"description\\": ..., \\"parameters\\": {...}\\n}\\n",
     "chat": "USER: What is 1 USD in EUR?\\n\\n\\nASSISTANT: <functioncall> {\\"name\\": \\"get_exchange_rate\\",
        \\"arguments\\": '{\\"from\\": \\"USD\\", \\"to\\": \\"EUR\\"}'} <|endoftext|>\\n\\n\\nFUNCTION RESPONSE: ..."}

The arguments' single quotes make the call no JSON: name and arguments are read apart.
"""

import re
from collections.abc import Mapping
from typing import Any

from tasks.contracts.conversation import Message
from tasks.dataset.rendering.strict_json import STRICT
from tasks.dataset.sources.literals import Repairs
from tasks.dataset.sources.rows import Conversation, RowRejected, conversation, read_call, read_tools

TURN = re.compile(r"^(USER|ASSISTANT|FUNCTION RESPONSE):", re.MULTILINE)
CALL = re.compile(r"^\{\s*\"name\":\s*\"([^\"]+)\",\s*\"arguments\":\s*'(.*)'\s*\}$", re.DOTALL)


def read(row: Mapping[str, Any], repairs: Repairs) -> Conversation:
    """The conversation in a row; raises RowRejected."""
    system, chat = row.get("system"), row.get("chat")
    if not isinstance(system, str) or not isinstance(chat, str) or not chat.strip():
        raise RowRejected("no_conversation", "the columns system and chat must be text")
    tools = read_tools(_objects(system), repairs)
    before, *rest = TURN.split(chat)
    if before.strip():
        raise RowRejected("bad_turn", f"chat begins with no role: {before[:120]!r}")
    turns = [_turn(role, text, repairs) for role, text in zip(rest[::2], rest[1::2], strict=True)]
    return conversation(turns, tools, repairs)


def _objects(text: str) -> list[Any]:
    """Every JSON object that stands in a text."""
    found, position = [], 0
    while (start := text.find("{", position)) >= 0:
        try:
            value, position = STRICT.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            raise RowRejected("bad_tools", f"{error}: {text[start : start + 120]!r}") from error
        found.append(value)
    return found


def _turn(role: str, text: str, repairs: Repairs) -> Message:
    text = text.replace("<|endoftext|>", "").strip()
    if role == "USER":
        return Message("user", text)
    if role == "FUNCTION RESPONSE":
        return Message("tool", text)
    if "<functioncall>" not in text:
        return Message("assistant", text)
    words, _, body = text.partition("<functioncall>")
    body = body.strip()
    if words.strip():
        repairs["words_beside_a_call"] += 1
    if match := CALL.match(body):
        repairs["glaive_quoting"] += 1
        call = read_call({"name": match.group(1), "arguments": match.group(2)}, repairs)
        return Message("assistant", calls=(call,))
    return Message("assistant", calls=(read_call(body, repairs),))
