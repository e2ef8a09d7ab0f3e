"""How a model family writes conversations with tools: the one place that training and both inferences go through."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from tasks.contracts.conversation import Example, Message, Tool
from tasks.contracts.prediction import Reading
from tasks.dataset.rendering.llama3 import Llama3
from tasks.dataset.rendering.segment import Segment
from tasks.dataset.rendering.smollm2 import SmolLM2

FamilyName = Literal["smollm2", "llama3"]


class Family(Protocol):
    """One family's prompt and, beside it, the parser of its answers."""

    @property
    def end_of_turn(self) -> str:
        """The token that ends an answer."""

    def segments(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[Segment]:
        """Everything before the next answer, ending exactly where the model begins to write."""

    def answer(self, reply: Message) -> str:
        """The answer and its end of turn: what the loss counts."""

    def parse(self, text: str) -> Reading:
        """The calls in an answer, read to the letter of the format."""


FAMILIES: dict[FamilyName, Family] = {"smollm2": SmolLM2(), "llama3": Llama3()}


def detect_family(model: Path) -> FamilyName:
    """The family of a model folder, read off its tokenizer's special tokens.

    Raises:
        ValueError: no family fits; one is never guessed, since a wrong format is learnt and asked in silence.
    """
    config = json.loads((model / "config.json").read_text())
    tokens = _special_tokens(model)
    if config.get("model_type") == "llama" and "<|start_header_id|>" in tokens:
        return "llama3"
    if config.get("model_type") == "llama" and "<|im_start|>" in tokens:
        return "smollm2"
    raise ValueError(
        f"no conversation format is known for the model in {model} (model_type={config.get('model_type')!r}); "
        f"set model.family to the one it was trained with, one of: {', '.join(FAMILIES)}"
    )


def _special_tokens(model: Path) -> set[str]:
    path = model / "tokenizer.json"
    if not path.exists():
        return set()
    return {token["content"] for token in json.loads(path.read_text())["added_tokens"]}


def prompt_text(family: Family, example: Example) -> str:
    """What the model is asked, as text."""
    return "".join(segment.text for segment in family.segments(example.messages, example.tools))


def encode_prompt(tokenizer: Any, family: Family, example: Example) -> list[int]:
    """Token ids of what the model is asked."""
    ids, _ = _encode(tokenizer, family.segments(example.messages, example.tools))
    return ids


def encode_conversation(tokenizer: Any, family: Family, example: Example) -> tuple[list[int], list[bool]]:
    """Token ids of the whole conversation, and which of them belong to answers."""
    answer = Segment(family.answer(example.reply), True)
    return _encode(tokenizer, [*family.segments(example.messages, example.tools), answer])


def _encode(tokenizer: Any, segments: Sequence[Segment]) -> tuple[list[int], list[bool]]:
    """Segments are tokenised apart, so that inference asks with exactly the ids that training taught.

    Tokenised together, a token could reach across the border of prompt and answer.
    """
    ids: list[int] = []
    is_answer: list[bool] = []
    for segment in segments:
        piece = tokenizer(segment.text, add_special_tokens=False)["input_ids"]
        ids += piece
        is_answer += [segment.is_answer] * len(piece)
    return ids, is_answer
