"""How well a model foretells given answers: the expected ones of the test, and those of plain conversations.

The second guards against forgetting. ``plain_conversations.jsonl`` holds requests as people make them of any chat model, with
answers, and without tools; no run trains on them. Both models are measured on the same words, so that what counts is how the
loss moves, not how high it is.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tasks.contracts.conversation import Example, Message
from tasks.dataset.rendering.family import Family, encode_prompt

PLAIN = Path(__file__).parent / "plain_conversations.jsonl"


@dataclass(frozen=True)
class LossSum:
    """Cross-entropy in nats, added up over answers' tokens."""

    nats: float = 0.0
    num_tokens: int = 0

    def __add__(self, other: "LossSum") -> "LossSum":
        return LossSum(self.nats + other.nats, self.num_tokens + other.num_tokens)

    @property
    def mean(self) -> float | None:
        """Per token; None of nothing."""
        return self.nats / self.num_tokens if self.num_tokens else None


def plain_conversations() -> list[Example]:
    """The plain conversations as examples without tools."""
    rows = [json.loads(line) for line in PLAIN.read_text(encoding="utf-8").splitlines()]
    return [
        Example(f"plain-{i}", (Message("user", row["user"]),), (), (), row["assistant"], "plain", "test")
        for i, row in enumerate(rows)
    ]


def reference_ids(tokenizer: Any, family: Family, example: Example) -> list[int]:
    """Token ids of the example's last answer, its end of turn with it."""
    ids: list[int] = tokenizer(family.answer(example.reply), add_special_tokens=False)["input_ids"]
    return ids


def answer_loss(model: Any, tokenizer: Any, family: Family, examples: Sequence[Example]) -> LossSum:
    """The loss of each example's last answer and its end of turn, behind exactly the ids that inference asks with.

    One conversation at a time: nothing is padded, and only the answer's positions pass the language-model head.
    """
    total = LossSum()
    for example in examples:
        prompt, answer = encode_prompt(tokenizer, family, example), reference_ids(tokenizer, family, example)
        ids = torch.tensor([prompt + answer], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
            nats = torch.nn.functional.cross_entropy(logits, ids[0, -len(answer) :], reduction="sum")
        total += LossSum(float(nats), len(answer))
    return total
