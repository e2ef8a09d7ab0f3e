"""Inference speed: ``make benchmark-inference``, or ``python -m tests.benchmarks.inference_speed [--small]``.

Llama 3.1 8B's shape with random weights in bfloat16 on one GPU, every prompt another one of about 600 tokens, 64 new tokens for
each, no prefix reused. The project's own engine at several batch sizes, for the original model and with a LoRA adapter of rank 64
on all linear layers, against ``generate`` of transformers asked one request at a time. ``--small`` does the same with the
embedded model and few short requests, where there is no GPU. Needs torch, transformers, peft and nothing that orchestrates; less
than three minutes on an H100. Table last.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

from tasks.contracts.conversation import Example, Message
from tasks.contracts.settings import ModelSettings
from tasks.dataset.rendering.family import Family, encode_prompt, family_for
from tasks.inference.adapted import load
from tasks.inference.fixed_cache import FixedCacheDecoder
from tasks.inference.generate import generate
from tasks.models.load import device, load_model, load_tokenizer, resolve_precision
from tasks.models.materialise import materialise
from tasks.models.memory import free_memory, peak_memory_gbytes
from tests.benchmarks.llama_8b import make_model

GOALS = {"new tokens/s": 3000.0, "ratio to one at a time": 50.0, "fine-tuned / original": 0.85}
LORA = {"r": 64, "lora_alpha": 128}
NUM_TIMED_BATCHES = 2
MAX_SHORTFALL = 0.5
"""See :func:`largest_shortfall`; bfloat16 keeps eight bits of a logit."""


@dataclass(frozen=True)
class Size:
    """How much is asked."""

    batch_sizes: tuple[int, ...]
    num_one_at_a_time: int
    num_words: tuple[int, int]
    num_new_tokens: int


# The format's system message takes about 155 tokens, and a word is one.
FULL = Size((64, 256, 512), 4, (440, 540), 64)
SMALL = Size((2, 4), 2, (20, 30), 8)


@dataclass(frozen=True)
class Figure:
    """One model at one batch size; seconds of a batch's prompts alone tell what is left for a step."""

    who: str
    batch_size: int
    new_tokens_per_s: float
    prompt_s: float
    step_ms: float
    peak_gbytes: float


def make_examples(count: int, size: Size, draw: random.Random) -> list[Example]:
    """Requests of random words, no two alike."""
    texts = [" ".join(f"w{draw.randrange(3, 100)}" for _ in range(draw.randint(*size.num_words))) for _ in range(count)]
    return [Example(f"{i:05d}", (Message("user", text),), (), (), "", "", "test") for i, text in enumerate(texts)]


def make_adapter(base: Path, folder: Path, precision: Any) -> Path:
    """An adapter whose factors are random and not zero, as if it had been trained."""
    config = LoraConfig(**LORA, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load_model(base, precision), config).save_pretrained(folder)
    return folder


def answer(model: Any, tokenizer: Any, family: Family, examples: Sequence[Example], batch_size: int, new: int) -> float:
    """Seconds in which the project's engine answers all of them with exactly ``new`` tokens each."""
    began = time.perf_counter()
    for prediction in generate(model, tokenizer, family, examples, batch_size=batch_size, max_new_tokens=new):
        if prediction.num_new_tokens != new:
            raise RuntimeError(
                f"{prediction.num_new_tokens} new tokens instead of {new}: the figures would not compare"
            )
    return time.perf_counter() - began


def largest_shortfall(model: Any, tokenizer: Any, family: Family, examples: Sequence[Example], new: int) -> float:
    """How far an engine's token lies below the likeliest one of a plain pass over the same text, in the logits' spread.

    Of random weights the likeliest tokens are nearly tied, and rounding decides; a token that the engine took wrongly lies about
    four standard deviations lower.
    """
    prompts = [encode_prompt(tokenizer, family, example) for example in examples]
    decoder = FixedCacheDecoder(
        model,
        end=tokenizer.convert_tokens_to_ids(family.end_of_turn),
        pad=tokenizer.pad_token_id,
        batch_size=len(prompts),
        max_prompt_tokens=max(map(len, prompts)),
        max_new_tokens=new,
    )
    largest = 0.0
    for prompt, answer in zip(prompts, decoder.answer(prompts), strict=True):
        ids = torch.tensor([prompt + answer[:-1]], device=model.device)
        logits = model(ids, use_cache=False, logits_to_keep=new).logits[0].float()
        taken = logits.gather(1, torch.tensor(answer, device=model.device)[:, None])[:, 0]
        largest = max(largest, float(((logits.amax(1) - taken) / logits.std(1)).max()))
    return largest


def one_at_a_time(model: Any, tokenizer: Any, family: Family, examples: Sequence[Example], new: int) -> float:
    """New tokens a second of transformers' ``generate`` as it comes, after one request to warm up."""
    began = 0.0
    for number, example in enumerate(examples):
        if number == 1:
            began = time.perf_counter()
        ids = torch.tensor([encode_prompt(tokenizer, family, example)], device=model.device)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new, do_sample=False
        )
        if output.shape[1] != ids.shape[1] + new:
            raise RuntimeError(f"{output.shape[1] - ids.shape[1]} new tokens instead of {new}")
    return (len(examples) - 1) * new / (time.perf_counter() - began)


def measure(who: str, model: Any, tokenizer: Any, family: Family, size: Size) -> list[Figure]:
    """The project's engine at every batch size."""
    draw, found = random.Random(who), []
    for batch_size in size.batch_sizes:
        if device().type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        warmup, prompts, timed = (make_examples(batch_size * n, size, draw) for n in (1, 1, NUM_TIMED_BATCHES))
        answer(model, tokenizer, family, warmup, batch_size, size.num_new_tokens)
        prompt_s = answer(model, tokenizer, family, prompts, batch_size, 1)
        seconds = answer(model, tokenizer, family, timed, batch_size, size.num_new_tokens)
        step_s = (seconds / NUM_TIMED_BATCHES - prompt_s) / (size.num_new_tokens - 1)
        speed = len(timed) * size.num_new_tokens / seconds
        found.append(Figure(who, batch_size, speed, prompt_s, step_s * 1000, peak_memory_gbytes()))
        print(found[-1], flush=True)
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--small", action="store_true", help="the embedded model and few short requests")
    arguments = parser.parse_args()
    if not arguments.small and not torch.cuda.is_available():
        raise SystemExit("error: 8B parameters need a GPU of 80 GB, and there is none here; try --small")
    size = SMALL if arguments.small else FULL
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="inference-speed-") as root:
        if arguments.small:
            base = materialise(ModelSettings(name="embedded"), Path("storage"))
        else:
            base = make_model(Path(root) / "model")
        precision = resolve_precision("auto")
        adapter = make_adapter(base, Path(root) / "adapter", precision)
        tokenizer = load_tokenizer(base)
        family = family_for("generic", tokenizer)
        singles: dict[str, float] = {}
        figures: list[Figure] = []
        for who, given in (("original", None), ("fine-tuned", adapter)):
            free_memory()
            model = load(base, given, precision)
            print(f"{time.perf_counter() - began:.0f} s: {who} model loaded, {precision}", flush=True)
            # The answers' lengths are forced: the token that ends one is never the likeliest.
            model.get_output_embeddings().weight[tokenizer.eos_token_id].zero_()
            asked = make_examples(size.num_one_at_a_time + 1, size, random.Random(f"{who} alone"))
            singles[who] = one_at_a_time(model, tokenizer, family, asked, size.num_new_tokens)
            print(f"{who}, one at a time: {singles[who]:.1f} new tokens/s", flush=True)
            short = largest_shortfall(model, tokenizer, family, asked, size.num_new_tokens)
            print(f"{who}: every token within {short:.3f} standard deviations of a plain pass's likeliest", flush=True)
            if short > MAX_SHORTFALL:
                raise SystemExit(f"error: more than {MAX_SHORTFALL}: the engine does not answer what the model would")
            figures += measure(who, model, tokenizer, family, size)
            del model
    length = sum(len(encode_prompt(tokenizer, family, example)) for example in asked) / len(asked)
    print(table(figures, singles, length, size, time.perf_counter() - began))


def table(figures: Sequence[Figure], singles: dict[str, float], length: float, size: Size, seconds: float) -> str:
    """All figures, and the goals with the best batch size's."""
    where = torch.cuda.get_device_name() if device().type == "cuda" else "CPU"
    lines = [
        "",
        f"{where}, torch {torch.__version__}, transformers {transformers.__version__}; prompts of {length:.0f} tokens, "
        f"{size.num_new_tokens} new; {seconds:.0f} s in all",
        f"{'':12} {'at a time':>9} {'new tokens/s':>12} {'ratio':>7} {'prompts s':>9} {'step ms':>8} {'peak GB':>8}",
    ]
    lines += [f"{who:12} {1:9} {speed:12.1f} {speed / singles['original']:7.1f}" for who, speed in singles.items()]
    lines += [
        f"{f.who:12} {f.batch_size:9} {f.new_tokens_per_s:12.1f} {f.new_tokens_per_s / singles['original']:7.1f} "
        f"{f.prompt_s:9.2f} {f.step_ms:8.1f} {f.peak_gbytes:8.1f}"
        for f in figures
    ]
    best = {f.who: f for f in sorted(figures, key=lambda f: f.new_tokens_per_s)}
    original, finetuned = best["original"].new_tokens_per_s, best["fine-tuned"].new_tokens_per_s
    reached = (original, original / singles["original"], finetuned / original)
    for (what, goal), value in zip(GOALS.items(), reached, strict=True):
        lines.append(f"{what:24} {value:9.2f}   goal on one H200: {goal:g}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
