"""Mistral 7B Instruct v0.3 and others with the v3 SentencePiece tokenizer: control tokens around JSON.

Follows mistral-common's v3 encoder, id by id, with three choices. The model's own template says the same, except that it
loses the system message once anything follows the last request, and writes a result in words without quotes.

- Tools and system message stand before the first request instead of the last one. The official place moves with every
  request, so an earlier answer would be taught without the tools that it calls. Conversations of one request, as most
  are, come out exactly as the official ones.
- Each call carries an id of nine letters and digits, which its result repeats. Ids only need to differ within an answer,
  so calls are numbered (``call00001``): an id by chance or by hash would be taught, and could not be learnt.
- Results have no ids of their own in our data, so the first result is the first call's, and so on.

Inference drops control tokens from what it reads, ``[TOOL_CALLS]`` among them, so calls are known by their JSON list.

A prompt and an answer::

    <s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "get_weather", ...}}][/AVAILABLE_TOOLS][INST] Be brief.

    How warm is it in Oslo?[/INST][TOOL_CALLS] [{"name": "get_weather", "arguments": {...}, "id": "call00001"}]</s>
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from tasks.contracts.conversation import Call, Message, Tool
from tasks.contracts.prediction import Reading
from tasks.dataset.rendering.json_calls import as_call
from tasks.dataset.rendering.segment import Segment
from tasks.dataset.rendering.strict_json import STRICT

CALLS = "[TOOL_CALLS]"
LIST_OF_OBJECTS = re.compile(r"\[\s*\{")


class Mistral:
    """The ``mistral`` family."""

    end_of_turn = "</s>"

    def segments(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[Segment]:
        system = "".join(f"{message.content}\n\n" for message in messages if message.role == "system")
        definitions = [{"type": "function", "function": tool} for tool in tools]
        text = "<s>"
        segments: list[Segment] = []
        is_first_request = True
        num_results = 0
        for message in messages:
            if message.role == "user":
                if is_first_request and tools:
                    text += f"[AVAILABLE_TOOLS] {_json(definitions)}[/AVAILABLE_TOOLS]"
                text += f"[INST] {system if is_first_request else ''}{message.content}[/INST]"
                is_first_request = False
            elif message.role == "tool":
                num_results += 1
                result = {"content": _content(message.content), "call_id": _call_id(num_results)}
                text += f"[TOOL_RESULTS] {_json(result)}[/TOOL_RESULTS]"
            elif message.role == "assistant":
                segments += [Segment(text, False), Segment(self.answer(message), True)]
                text, num_results = "", 0
        return [*segments, Segment(text, False)]

    def answer(self, reply: Message) -> str:
        if not reply.calls:
            # The space is SentencePiece's own: every text begins with one.
            return f" {reply.content.strip()}{self.end_of_turn}"
        calls = [
            {"name": call.name, "arguments": call.arguments, "id": _call_id(number)}
            for number, call in enumerate(reply.calls, start=1)
        ]
        return f"{CALLS} {_json(calls)}{self.end_of_turn}"

    def parse(self, text: str) -> Reading:
        """One JSON list of calls and nothing else, with or without ids, which the untrained model leaves out."""
        text = text.strip()
        is_marked = text.startswith(CALLS)
        text = text.removeprefix(CALLS).lstrip()
        if not is_marked and not LIST_OF_OBJECTS.match(text):
            # A mark further on was not dropped by inference, so it is no control token but a slip.
            return Reading((), f"text before {CALLS}") if CALLS in text else Reading(())
        try:
            values = STRICT.decode(text)
        except (ValueError, RecursionError) as error:
            return Reading((), f"not JSON: {error}")
        if not isinstance(values, list) or not values:
            return Reading((), f"{CALLS} is followed by a JSON list of calls, got {text[:80]!r}")
        calls: list[Call] = []
        for value in values:
            call = as_call(_without_id(value), arguments_key="arguments")
            if isinstance(call, str):
                return Reading((), call)
            calls.append(call)
        return Reading(tuple(calls))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _call_id(number: int) -> str:
    return f"call{number:05}"


def _content(result: str) -> Any:
    try:
        return json.loads(result)
    except (ValueError, RecursionError):
        return result


def _without_id(value: Any) -> Any:
    if isinstance(value, dict) and isinstance(value.get("id"), str):
        return {key: item for key, item in value.items() if key != "id"}
    return value
