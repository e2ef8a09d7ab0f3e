"""glaive-function-calling-v2 (Apache-2.0), raw ``chat`` strings.

A row, shortened::

    {"system": "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\\n{\\n
        \\"name\\": \\"get_exchange_rate\\", \\"description\\": ..., \\"parameters\\": {...}\\n}\\n",
     "chat": "USER: What is 1 USD in EUR?\\n\\n\\nASSISTANT: <functioncall> {\\"name\\": \\"get_exchange_rate\\",
        \\"arguments\\": '{\\"from\\": \\"USD\\", \\"to\\": \\"EUR\\"}'} <|endoftext|>\\n\\n\\nFUNCTION RESPONSE: ..."}

The arguments' single quotes make the call no JSON: name and arguments are read apart.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from tasks.contracts.conversation import Call, Message
from tasks.dataset.sources.rows import Conversation, RowRejected, conversation, load_json, read_call, read_tools

TURN = re.compile(r"(USER|ASSISTANT|FUNCTION RESPONSE):(.*?)(?=\n+(?:USER|ASSISTANT|FUNCTION RESPONSE):|\Z)", re.DOTALL)
CALL = re.compile(r"^\{\s*\"name\":\s*\"([^\"]+)\",\s*\"arguments\":\s*'(.*)'\s*\}$", re.DOTALL)


def read(row: Mapping[str, Any]) -> Conversation:
    """The conversation in a row; raises RowRejected."""
    system, chat = row.get("system"), row.get("chat")
    if not isinstance(system, str) or not isinstance(chat, str) or not chat.strip():
        raise RowRejected("no_conversation", "the columns system and chat must be text")
    tools = read_tools(_objects(system))
    return conversation([_turn(role, text) for role, text in TURN.findall(chat)], tools)


def _objects(text: str) -> list[Any]:
    """Every JSON object that stands in a text."""
    decoder, found, position = json.JSONDecoder(), [], 0
    while (start := text.find("{", position)) >= 0:
        try:
            value, position = decoder.raw_decode(text, start)
        except ValueError as error:
            raise RowRejected("bad_tools", f"{error}: {text[start : start + 120]!r}") from error
        found.append(value)
    return found


def _turn(role: str, text: str) -> Message:
    text = text.replace("<|endoftext|>", "").strip()
    if role == "USER":
        return Message("user", text)
    if role == "FUNCTION RESPONSE":
        return Message("tool", text)
    if "<functioncall>" not in text:
        return Message("assistant", text)
    body = text.partition("<functioncall>")[2].strip()
    if match := CALL.match(body):
        arguments = load_json(match.group(2), "bad_call") if match.group(2).strip() else {}
        return Message("assistant", calls=(Call(match.group(1), arguments),))
    return Message("assistant", calls=(read_call(body),))
