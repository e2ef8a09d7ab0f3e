"""Qwen2, Qwen2.5 and Qwen3: ChatML, tools as JSON in the system turn, calls and results in tags.

Follows the official template of Qwen2.5 and of Qwen3, which differ in two things:

- Without a system message Qwen2.5 is given one, Qwen3 none.
- Qwen3 asked not to think (``enable_thinking=False``) finds an empty ``<think>`` block at the start of its answer. Here
  every answer follows one, as part of what is asked, and the loss does not count it: each answer is learnt behind the
  very ids that inference asks with. The official template drops the block from earlier answers, so that an answer
  inside of a conversation would be taught without it and asked for with it.

Qwen2's own template is plain ChatML, which ignores tools and results; it gets its own system message and, for what its
template cannot say, the text of Qwen2.5, whose tokens for the tags Qwen2 spells out.

A prompt of Qwen2.5::

    <|im_start|>system
    Be brief.

    # Tools

    You may call one or more functions to assist with the user query.

    You are provided with function signatures within <tools></tools> XML tags:
    <tools>
    {"type": "function", "function": {"name": "get_weather", "description": ..., "parameters": {...}}}
    </tools>

    For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
    <tool_call>
    {"name": <function-name>, "arguments": <args-json-object>}
    </tool_call><|im_end|>
    <|im_start|>user
    How warm is it in Oslo?<|im_end|>
    <|im_start|>assistant
"""

import json
from collections.abc import Sequence

from tasks.contracts.by_identity import by_identity
from tasks.contracts.conversation import Message, Tool
from tasks.contracts.prediction import Reading
from tasks.dataset.rendering.json_calls import CLOSE, OPEN, read_tagged_calls, write_call
from tasks.dataset.rendering.segment import Segment

BEFORE_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
AFTER_TOOLS = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


class Qwen:
    """The families ``qwen2``, ``qwen2_5`` and ``qwen3``.

    Args:
        default_system: the system message of a conversation that brings none.
        before_answer: what stands between the head of an assistant's turn and the answer.
    """

    end_of_turn = "<|im_end|>"

    def __init__(self, *, default_system: str | None, before_answer: str = "") -> None:
        self._default_system = default_system
        self._assistant = f"<|im_start|>assistant\n{before_answer}"

    def segments(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[Segment]:
        begins_with_system = bool(messages) and messages[0].role == "system"
        system = messages[0].content if begins_with_system else self._default_system
        if tools:
            definitions = "\n".join(_definition(tool) for tool in tools)
            system = ("" if system is None else f"{system}\n\n") + BEFORE_TOOLS + definitions + AFTER_TOOLS
        text = "" if system is None else self._turn("system", system)
        segments: list[Segment] = []
        results: list[str] = []
        for message in messages[begins_with_system:]:
            # Results in a row share one user's turn.
            if message.role == "tool":
                results.append(f"<tool_response>\n{message.content}\n</tool_response>")
                continue
            text += self._results(results)
            results = []
            if message.role == "assistant":
                segments += [Segment(text + self._assistant, False), Segment(self.answer(message), True)]
                text = "\n"
            else:
                text += self._turn(message.role, message.content)
        return [*segments, Segment(text + self._results(results) + self._assistant, False)]

    def _turn(self, role: str, content: str) -> str:
        return f"<|im_start|>{role}\n{content}{self.end_of_turn}\n"

    def _results(self, results: Sequence[str]) -> str:
        return self._turn("user", "\n".join(results)) if results else ""

    def answer(self, reply: Message) -> str:
        calls = [f"{OPEN}\n{write_call(call)}\n{CLOSE}" for call in reply.calls]
        return ("\n".join(calls) or reply.content) + self.end_of_turn

    def parse(self, text: str) -> Reading:
        return read_tagged_calls(text)


@by_identity
def _definition(tool: Tool) -> str:
    return json.dumps({"type": "function", "function": tool}, ensure_ascii=False)


QWEN2 = Qwen(default_system="You are a helpful assistant.")
QWEN2_5 = Qwen(default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
QWEN3 = Qwen(default_system=None, before_answer="<think>\n\n</think>\n\n")
