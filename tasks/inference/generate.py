"""Examples to predictions with the model itself: sorted by length, batched; smaller batches where memory ends."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from tasks.contracts.conversation import Example
from tasks.contracts.prediction import Prediction
from tasks.dataset.rendering.family import Family, encode_prompt
from tasks.dataset.rendering.json_calls import read_leniently
from tasks.inference.fixed_cache import FixedCacheDecoder, has_fixed_cache, left_padded
from tasks.inference.losses import LossSum, reference_ids
from tasks.inference.sampling import SeededSampling
from tasks.models.memory import free_memory, is_out_of_memory

WORTH_A_NEW_CACHE = 0.75
"""Of a cache's length: prompts that need no more get a cache of their own."""


class OutOfMemory(RuntimeError):
    """Not even one request fits."""


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    family: Family,
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    references: Collection[str] = (),
    on_done: Callable[[int], None] = lambda done: None,
    on_smaller: Callable[[int], None] = lambda batch_size: None,
    on_reference: Callable[[str, LossSum], None] = lambda name, loss: None,
) -> Iterator[Prediction]:
    """Answers in an order of their own; each prediction names its example.

    Args:
        temperature: 0 is greedy; above, answers are drawn, each by ``seed`` and the example's id.
        references: ids of examples whose expected answers are read behind their prompts, where that is cheap.
        on_done: told the number of finished examples after every batch.
        on_smaller: told the new batch size when memory did not suffice for the one before.
        on_reference: told the loss on an expected answer; not called where that would cost the prompt once more.

    Raises:
        OutOfMemory: a single request needs more memory than there is.
    """
    prompts = [(encode_prompt(tokenizer, family, example), example) for example in examples]
    # Longest first: memory that suffices for the first batch suffices for all, and equals waste no padding.
    prompts.sort(key=lambda item: (-len(item[0]), item[1].id))
    end = tokenizer.convert_tokens_to_ids(family.end_of_turn)
    is_fixed = not temperature and has_fixed_cache(model)
    engine = _Engine(model, tokenizer.pad_token_id, end, max_new_tokens, temperature, seed, is_fixed)
    wanted = frozenset(references) if is_fixed else frozenset()
    done = 0
    while done < len(prompts):
        batch = prompts[done : done + batch_size]
        began = time.perf_counter()
        expected = [reference_ids(tokenizer, family, example) if example.id in wanted else [] for _, example in batch]
        answers = _try(engine, [(example.id, ids) for ids, example in batch], expected, batch_size)
        if answers is None:
            if len(batch) == 1:
                raise OutOfMemory(
                    f"the request {batch[0][1].id} of {len(batch[0][0])} tokens does not fit into memory alone; lower "
                    "dataset.max_length_tokens or inference.max_new_tokens, or use a GPU with more memory"
                )
            batch_size = len(batch) // 2
            on_smaller(batch_size)
            continue
        latency = time.perf_counter() - began
        for (prompt, example), ids in zip(batch, answers, strict=True):
            yield _prediction(tokenizer, family, example, len(prompt), ids, end, latency)
        if engine.decoder is not None:
            for (_, example), reference, nats in zip(batch, expected, engine.decoder.nats, strict=True):
                if reference:
                    on_reference(example.id, LossSum(nats, len(reference)))
        done += len(batch)
        on_done(done)


def _prediction(
    tokenizer: Any, family: Family, example: Example, num_prompt_tokens: int, ids: list[int], end: int, latency: float
) -> Prediction:
    was_cut = end not in ids
    ids = ids if was_cut else ids[: ids.index(end)]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return Prediction(
        example_id=example.id,
        text=text,
        strict=family.parse(text),
        lenient=read_leniently(text),
        num_prompt_tokens=num_prompt_tokens,
        num_new_tokens=len(ids) + (not was_cut),
        was_cut=was_cut,
        latency_s=latency,
    )


@dataclass
class _Engine:
    """How the model is run: step by step over a fixed cache where that can be, else by transformers' ``generate``."""

    model: PreTrainedModel
    pad: int
    end: int
    max_new_tokens: int
    temperature: float
    seed: int
    is_fixed: bool
    decoder: FixedCacheDecoder | None = None

    def answer(
        self, batch: Sequence[tuple[str, list[int]]], references: Sequence[list[int]], batch_size: int
    ) -> list[list[int]]:
        """The new token ids of each request (id, prompt), up to ``max_new_tokens``."""
        prompts = [ids for _, ids in batch]
        drawing = LogitsProcessorList()
        if self.temperature:
            names = [name for name, _ in batch]
            drawing.append(SeededSampling(names, self.temperature, self.seed, self.model.device))
        elif self.is_fixed:
            decoder = self._decoder_for(max(map(len, prompts)), min(batch_size, len(prompts)))
            return decoder.answer(prompts, references)
        return _answer(self.model, self.pad, prompts, self.end, self.max_new_tokens, drawing)

    def _decoder_for(self, longest: int, batch_size: int) -> FixedCacheDecoder:
        """The one there is, until prompts are so much shorter that a cache of their own is worth its capture.

        Every step reads the whole cache, as long as the longest prompt it was made for; prompts come longest first.
        """
        if self.decoder is not None:
            length = self.decoder.max_prompt_tokens + self.max_new_tokens
            if longest + self.max_new_tokens > WORTH_A_NEW_CACHE * length:
                return self.decoder
            # Before the new one takes memory of its own.
            self.decoder = None
        self.decoder = FixedCacheDecoder(
            self.model, end=self.end, pad=self.pad, batch_size=batch_size,
            max_prompt_tokens=longest, max_new_tokens=self.max_new_tokens,
        )  # fmt: skip
        return self.decoder


def _try(
    engine: _Engine, batch: Sequence[tuple[str, list[int]]], references: Sequence[list[int]], batch_size: int
) -> list[list[int]] | None:
    """The answers, or None where memory ran out: outside of the handler, so that the error keeps no tensor alive."""
    try:
        return engine.answer(batch, references, batch_size)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    engine.decoder = None
    free_memory()
    return None


def _answer(
    model: PreTrainedModel,
    pad: int,
    prompts: Sequence[list[int]],
    end: int,
    max_new_tokens: int,
    drawing: LogitsProcessorList | None = None,
) -> list[list[int]]:
    """The new token ids of each prompt, up to ``max_new_tokens``."""
    ids, is_real = left_padded(prompts, pad, model.device)
    with torch.inference_mode():
        output: Any = model.generate(
            input_ids=ids,
            attention_mask=is_real.long(),
            max_new_tokens=max_new_tokens,
            # Draws, too, are the highest of the scores: of those that SeededSampling has changed.
            do_sample=False,
            logits_processor=drawing,
            # Qwen's own configuration asks for 1.05 or 1.1, which would no longer be greedy: calls repeat names and quotes.
            repetition_penalty=1.0,
            eos_token_id=end,
            pad_token_id=pad,
        )
    answers: list[list[int]] = output[:, ids.shape[1] :].tolist()
    return answers
