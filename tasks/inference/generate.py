"""Examples to predictions with plain transformers: sorted by length, batched, greedy."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from tasks.contracts.conversation import Example
from tasks.contracts.prediction import Prediction
from tasks.dataset.rendering.family import Family, encode_prompt
from tasks.dataset.rendering.json_calls import read_leniently


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    family: Family,
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_new_tokens: int,
    on_done: Callable[[int], None] = lambda done: None,
) -> Iterator[Prediction]:
    """Answers in an order of their own; each prediction names its example.

    Args:
        on_done: told the number of finished examples after every batch.
    """
    prompts = [(encode_prompt(tokenizer, family, example), example) for example in examples]
    # Longest first: memory that suffices for the first batch suffices for all, and equals waste no padding.
    prompts.sort(key=lambda item: (-len(item[0]), item[1].id))
    end = tokenizer.convert_tokens_to_ids(family.end_of_turn)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        began = time.perf_counter()
        answers = _answer(model, tokenizer, [ids for ids, _ in batch], end, max_new_tokens)
        latency = time.perf_counter() - began
        for (prompt, example), ids in zip(batch, answers, strict=True):
            was_cut = end not in ids
            ids = ids if was_cut else ids[: ids.index(end)]
            text = tokenizer.decode(ids, skip_special_tokens=True)
            yield Prediction(
                example_id=example.id,
                text=text,
                strict=family.parse(text),
                lenient=read_leniently(text),
                num_prompt_tokens=len(prompt),
                num_new_tokens=len(ids) + (not was_cut),
                was_cut=was_cut,
                latency_s=latency,
            )
        on_done(start + len(batch))


def _answer(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[list[int]], end: int, max_new_tokens: int
) -> list[list[int]]:
    """The new token ids of each prompt, up to ``max_new_tokens``; left-padded as decoders need it."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    with torch.inference_mode():
        output: Any = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
        )
    answers: list[list[int]] = output[:, width:].tolist()
    return answers
