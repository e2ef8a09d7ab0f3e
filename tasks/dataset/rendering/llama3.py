"""Llama 3.1, 3.2 and 3.3: JSON function calling, tools in the first user turn.

Follows the models' own template (tools in the user message, ``{"name": ..., "parameters": {...}}`` as answer), written
out here because that template refuses more than one call a turn and marks no answer. Parallel calls are one a line.
"""

import json
from collections.abc import Sequence

from tasks.contracts.by_identity import by_identity
from tasks.contracts.conversation import Message, Tool
from tasks.contracts.prediction import Reading
from tasks.dataset.rendering.json_calls import read_calls_by_line, write_call
from tasks.dataset.rendering.segment import Segment

SYSTEM = "Environment: ipython\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
INSTRUCTION = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    'answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of argument '
    "name and its value}. Do not use variables.\n\n"
)


@by_identity
def _definition(tool: Tool) -> str:
    return json.dumps({"type": "function", "function": tool}, indent=4)


class Llama3:
    """The ``llama3`` family."""

    end_of_turn = "<|eot_id|>"

    def segments(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[Segment]:
        own_system = "\n\n".join(message.content for message in messages if message.role == "system")
        text = "<|begin_of_text|>" + self._turn("system", SYSTEM + own_system)
        segments: list[Segment] = []
        tools_are_written = False
        for message in messages:
            if message.role == "assistant":
                segments += [Segment(text + self._header("assistant"), False), Segment(self.answer(message), True)]
                text = ""
            elif message.role == "tool":
                text += self._turn("ipython", message.content)
            elif message.role == "user":
                content = message.content
                if tools and not tools_are_written:
                    definitions = [_definition(tool) for tool in tools]
                    content = INSTRUCTION + "\n\n".join(definitions) + "\n\n" + content
                    tools_are_written = True
                text += self._turn("user", content)
        return [*segments, Segment(text + self._header("assistant"), False)]

    def _header(self, role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    def _turn(self, role: str, content: str) -> str:
        return self._header(role) + content + self.end_of_turn

    def answer(self, reply: Message) -> str:
        calls = [write_call(call, arguments_key="parameters") for call in reply.calls]
        return ("\n".join(calls) or reply.content) + self.end_of_turn

    def parse(self, text: str) -> Reading:
        return read_calls_by_line(text, arguments_key="parameters")
