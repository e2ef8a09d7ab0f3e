"""How a model family writes conversations with tools: the one place that training and both inferences go through."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from tasks.contracts.conversation import Example, Message, Tool
from tasks.contracts.prediction import Reading
from tasks.dataset.rendering.generic import Generic
from tasks.dataset.rendering.llama3 import Llama3
from tasks.dataset.rendering.mistral import Mistral
from tasks.dataset.rendering.qwen import QWEN2, QWEN2_5, QWEN3
from tasks.dataset.rendering.segment import Segment
from tasks.dataset.rendering.smollm2 import SmolLM2

FamilyName = Literal["smollm2", "llama3", "qwen2", "qwen2_5", "qwen3", "mistral", "generic"]


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


FAMILIES: dict[FamilyName, Family] = {
    "smollm2": SmolLM2(),
    "llama3": Llama3(),
    "qwen2": QWEN2,
    "qwen2_5": QWEN2_5,
    "qwen3": QWEN3,
    "mistral": Mistral(),
}
"""All but ``generic``, which is made for a tokenizer."""


def family_for(name: FamilyName, tokenizer: Any) -> Family:
    """The family of that name, ending its answers as ``tokenizer`` can."""
    return Generic.for_tokenizer(tokenizer) if name == "generic" else FAMILIES[name]


def detect_family(model: Path) -> FamilyName:
    """The family of a model folder, read off its architecture, its tokenizer's special tokens and its template.

    Raises:
        ValueError: no family fits; one is never guessed, since a wrong format is learnt and asked in silence.
    """
    config = json.loads((model / "config.json").read_text())
    family = _family(config, _special_tokens(model), _chat_template(model))
    if family is not None:
        return family
    kind = str(config.get("model_type"))
    if kind.startswith("gemma"):
        raise ValueError(
            f"no conversation format is known for the model in {model} (model_type={kind!r}): the template of Gemma 1 "
            "to 3 knows no tools, and FunctionGemma and Gemma 4 end a call with another token than an answer in words; "
            "set model.family=generic to teach plain text instead"
        )
    raise ValueError(
        f"no conversation format is known for the model in {model} (model_type={config.get('model_type')!r}); "
        f"set model.family to the one it was trained with, one of: {', '.join(FAMILIES)}; "
        "or to generic, plain text that any model can be taught"
    )


def _family(config: Mapping[str, Any], tokens: set[str], template: str) -> FamilyName | None:
    kind = config.get("model_type")
    if kind == "llama" and "<|start_header_id|>" in tokens:
        return "llama3"
    if kind == "llama" and "<|im_start|>" in tokens:
        return "smollm2"
    # Qwen2 and 2.5 are one architecture, but only 2.5 has tokens for the tags; QwQ has them and always thinks.
    if kind == "qwen2" and "<|im_start|>" in tokens and "<think>" not in tokens:
        return "qwen2_5" if "<tool_call>" in tokens else "qwen2"
    # Later Qwen3 either always think or never do, and their templates lack the switch that our format stands for.
    if kind in ("qwen3", "qwen3_moe") and "<think>" in tokens and "enable_thinking" in template:
        return "qwen3"
    # The v3 tokenizer of 32,768 entries: Nemo's has 131,072 and writes no spaces, v7 knows [SYSTEM_PROMPT].
    is_v3 = config.get("vocab_size") == 32768 and "[TOOL_CALLS]" in tokens and "[SYSTEM_PROMPT]" not in tokens
    return "mistral" if kind == "mistral" and is_v3 else None


def _special_tokens(model: Path) -> set[str]:
    path = model / "tokenizer.json"
    if not path.exists():
        return set()
    return {token["content"] for token in json.loads(path.read_text())["added_tokens"]}


def _chat_template(model: Path) -> str:
    """The template in the file of its own that later versions of transformers write, or else in the tokenizer's."""
    path = model / "chat_template.jinja"
    if path.exists():
        return path.read_text()
    path = model / "tokenizer_config.json"
    return str(json.loads(path.read_text()).get("chat_template", "")) if path.exists() else ""


def prompt_text(family: Family, example: Example) -> str:
    """What the model is asked, as text."""
    return "".join(segment.text for segment in family.segments(example.messages, example.tools))


def segments_of(family: Family, example: Example) -> list[Segment]:
    """The whole conversation, its last answer included."""
    return [*family.segments(example.messages, example.tools), Segment(family.answer(example.reply), True)]


def encode_prompt(tokenizer: Any, family: Family, example: Example) -> list[int]:
    """Token ids of what the model is asked."""
    ids, _ = _encode(tokenizer, family.segments(example.messages, example.tools))
    return ids


def encode_conversation(tokenizer: Any, family: Family, example: Example) -> tuple[list[int], list[bool]]:
    """Token ids of the whole conversation, and which of them belong to answers."""
    return _encode(tokenizer, segments_of(family, example))


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
