"""What each choice of ``tasks/training`` for a CPU is worth: ``python -m tests.benchmarks.training_step [STEPS]``.

One process, one thread, the embedded model, random token ids in the lengths of the demo's conversations. The variants
take turns at every step, so that other load on the machine falls on all alike; figures are medians, ratios to TRL's own
trainer as it comes.
"""

import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from tasks.contracts.settings import LoraSettings, ModelSettings
from tasks.models.load import load_model, load_tokenizer, quiet_loading
from tasks.models.materialise import materialise
from tasks.training.adapter import lora_config
from tasks.training.answer_only_loss import AnswerOnlyTrainer

ANSWER_SHARE = 0.25
LENGTHS_TOKENS = (90, 250)
STORAGE = Path("storage")


class _SameAttention(AnswerOnlyTrainer):
    """Whatever the length."""

    def _attend_by_length(self, tokens: torch.Tensor) -> None:
        return


def main(num_steps: int) -> None:
    torch.set_num_threads(1)
    quiet_loading()
    model = materialise(ModelSettings(name="embedded"), STORAGE)
    variants = {
        "TRL as it comes": _step(model, SFTTrainer, held=False, attention="sdpa", multiple=1),
        "+ matrices held in bfloat16": _step(model, SFTTrainer, held=True, attention="sdpa", multiple=1),
        "+ answers through the head in one product": _step(
            model, _SameAttention, held=True, attention="sdpa", multiple=1
        ),
        "+ plain products as attention": _step(model, AnswerOnlyTrainer, held=True, attention="eager", multiple=1),
        "+ padded to multiples of 32": _step(model, AnswerOnlyTrainer, held=True, attention="eager", multiple=32),
    }
    draw = random.Random(1)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for step in range(num_steps + 1):
        length = draw.randint(*LENGTHS_TOKENS)
        for name, run in variants.items():
            began = time.perf_counter()
            run(length)
            # The first round pays for what is set up once.
            if step:
                seconds[name].append(time.perf_counter() - began)
        print(f"{step}/{num_steps}", end="\r", file=sys.stderr)
    base = statistics.median(seconds["TRL as it comes"])
    for name, times in seconds.items():
        print(f"{name:45} {statistics.median(times):6.3f} s a step   {base / statistics.median(times):5.2f} x")


def _step(
    model_folder: Path, kind: type[SFTTrainer], *, held: bool, attention: str, multiple: int
) -> Callable[[int], None]:
    """A function that does one forward and backward pass over a conversation of so many tokens."""
    model = load_model(model_folder, "mixed" if held else "float32")
    model.set_attn_implementation(attention)
    with tempfile.TemporaryDirectory() as folder:
        trainer = kind(
            model,
            SFTConfig(folder, use_cpu=True, bf16=True, report_to="none", dataset_kwargs={"skip_prepare_dataset": True}),
            train_dataset=Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]}),
            processing_class=load_tokenizer(model_folder),
            peft_config=lora_config(LoraSettings(first_layer=12), model),
        )

    def step(length: int) -> None:
        padded = -(-length // multiple) * multiple
        ids = torch.randint(5, 40_000, (1, padded))
        labels = ids.clone()
        labels[:, : int(length * (1 - ANSWER_SHARE))] = -100
        labels[:, length:] = -100
        mask = (torch.arange(padded) < length).long()[None]
        with torch.autocast("cpu", torch.bfloat16):
            loss = trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": labels, "attention_mask": mask})
        loss.backward()
        trainer.model.zero_grad()

    return step


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
