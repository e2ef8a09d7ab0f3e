"""SmolLM2: ChatML, whose own template ignores tools.

Tools are written as one-line signatures instead of JSON Schemas: for a 135M model on two cores the length of the prompt
is what inference and training cost, and a signature takes a quarter of the tokens. Types, enums, nesting,
descriptions and which parameters are optional are kept; ranges and patterns are not.

A prompt::

    <|im_start|>system
    Functions:
    // Current weather in a place
    get_weather(place: string, unit?: "celsius" | "fahrenheit")
    Answer <tool_call>{"name": ..., "arguments": {...}}</tool_call>, or say that none fits.<|im_end|>
    <|im_start|>user
    How warm is it in Oslo?<|im_end|>
    <|im_start|>assistant
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.contracts.by_identity import by_identity
from tasks.contracts.conversation import Message, Tool
from tasks.contracts.prediction import Reading
from tasks.dataset.rendering.json_calls import CLOSE, OPEN, read_tagged_calls, write_call
from tasks.dataset.rendering.segment import Segment

INSTRUCTION = 'Answer <tool_call>{"name": ..., "arguments": {...}}</tool_call>, or say that none fits.'
ASSISTANT = "<|im_start|>assistant\n"


class SmolLM2:
    """The ``smollm2`` family."""

    end_of_turn = "<|im_end|>"

    def segments(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[Segment]:
        own_system = "\n\n".join(message.content for message in messages if message.role == "system")
        system = own_system
        if tools:
            functions = "\n".join(["Functions:", *map(signature, tools), INSTRUCTION])
            system = f"{own_system}\n\n{functions}" if own_system else functions
        text = self._turn("system", system) if system else ""
        segments: list[Segment] = []
        for message in messages:
            if message.role == "assistant":
                segments += [Segment(text + ASSISTANT, False), Segment(self.answer(message), True)]
                text = "\n"
            elif message.role != "system":
                text += self._turn(message.role, message.content)
        return [*segments, Segment(text + ASSISTANT, False)]

    def _turn(self, role: str, content: str) -> str:
        return f"<|im_start|>{role}\n{content}{self.end_of_turn}\n"

    def answer(self, reply: Message) -> str:
        calls = [OPEN + write_call(call) + CLOSE for call in reply.calls]
        return ("\n".join(calls) or reply.content) + self.end_of_turn

    def parse(self, text: str) -> Reading:
        return read_tagged_calls(text)


@by_identity
def signature(tool: Tool) -> str:
    """``name(required: type, optional?: type)`` under its description.

    In this order, because each token sees only what stands before it: the name that the model is to copy then carries
    what the function does (3 points of exact match more after the same training than with the description last).
    """
    parameters = tool["parameters"]
    required = parameters.get("required", ())
    parts = [
        f"{name}{'' if name in required else '?'}: {_type(schema)}"
        for name, schema in parameters.get("properties", {}).items()
    ]
    description = tool.get("description")
    return (f"// {description}\n" if description else "") + f"{tool['name']}({', '.join(parts)})"


def _type(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        text = " | ".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    elif schema.get("type") == "array":
        text = _type(schema.get("items", {})) + "[]"
    elif schema.get("type") == "object" and schema.get("properties"):
        required = schema.get("required", ())
        fields = [f"{n}{'' if n in required else '?'}: {_type(s)}" for n, s in schema["properties"].items()]
        text = "{" + ", ".join(fields) + "}"
    elif schema.get("format") == "date":
        text = "date"
    else:
        kind = schema.get("type", "any")
        text = " | ".join(kind) if isinstance(kind, list) else str(kind)
    return f"{text} /* {schema['description']} */" if schema.get("description") else text
