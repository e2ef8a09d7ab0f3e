"""Plain text for models that have no conversation format with tools of their own, as base models and Gemma 1 to 3.

Chosen by ``model.family=generic`` only and never detected: it teaches a format instead of meeting one, so that the
original model's figures say little. It needs nothing but a tokenizer with an end-of-text token, which ends every answer.
The heads are ordinary text: a message that holds one reads like another turn.

A prompt, of a tokenizer that puts ``<s>`` first by itself::

    <s>### System
    Be brief.

    ### Functions
    {"name": "get_weather", "description": ..., "parameters": {...}}
    To call functions, answer with one {"name": ..., "arguments": {...}} a line and nothing else.

    ### User
    How warm is it in Oslo?

    ### Assistant
"""

import json
from collections.abc import Sequence
from typing import Any

from tasks.contracts.conversation import Message, Tool
from tasks.contracts.prediction import Reading
from tasks.dataset.rendering.json_calls import read_calls_by_line, write_call
from tasks.dataset.rendering.segment import Segment

INSTRUCTION = 'To call functions, answer with one {"name": ..., "arguments": {...}} a line and nothing else.'
HEADS = {"user": "User", "tool": "Result"}


class Generic:
    """The ``generic`` family for one tokenizer.

    Args:
        begin: the token at the start of a text, where the tokenizer puts one; else empty.
        end_of_turn: the tokenizer's end-of-text token.
    """

    def __init__(self, *, begin: str, end_of_turn: str) -> None:
        self._begin = begin
        self._end_of_turn = end_of_turn

    @classmethod
    def for_tokenizer(cls, tokenizer: Any) -> "Generic":
        """The family with the tokens that ``tokenizer`` itself puts around a text.

        Raises:
            ValueError: it has no end-of-text token, so an answer would never end.
        """
        if tokenizer.eos_token is None:
            raise ValueError("model.family=generic needs a tokenizer with an end-of-text token; this one has none")
        # Many tokenizers name a token for the start and do not write it; their models were trained without.
        ids = tokenizer("a")["input_ids"]
        begins = tokenizer.bos_token is not None and ids[0] == tokenizer.bos_token_id
        return cls(begin=tokenizer.bos_token if begins else "", end_of_turn=tokenizer.eos_token)

    @property
    def end_of_turn(self) -> str:
        return self._end_of_turn

    def segments(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[Segment]:
        system = "\n\n".join(message.content for message in messages if message.role == "system")
        text = self._begin
        if system:
            text += _turn("System", system)
        if tools:
            text += _turn("Functions", "\n".join([*(json.dumps(t, ensure_ascii=False) for t in tools), INSTRUCTION]))
        segments: list[Segment] = []
        for message in messages:
            if message.role == "assistant":
                segments += [Segment(text + _head("Assistant"), False), Segment(self.answer(message), True)]
                text = "\n\n"
            elif message.role != "system":
                text += _turn(HEADS[message.role], message.content)
        return [*segments, Segment(text + _head("Assistant"), False)]

    def answer(self, reply: Message) -> str:
        return ("\n".join(map(write_call, reply.calls)) or reply.content) + self.end_of_turn

    def parse(self, text: str) -> Reading:
        return read_calls_by_line(text, arguments_key="arguments")


def _head(name: str) -> str:
    return f"### {name}\n"


def _turn(name: str, content: str) -> str:
    return f"{_head(name)}{content}\n\n"
