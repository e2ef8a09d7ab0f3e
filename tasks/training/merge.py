"""The adapter merged into a copy of its base: one model to ship, checked against base and adapter on real prompts."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tasks.contracts.files import publish_folder, write_json
from tasks.models.load import load_tokenizer

NUM_PROMPTS = 8
MAX_TOKENS = 512
"""Of each prompt: float32 on a CPU is slow, and a wrong merge shows in the first tokens."""
MAX_DIFFERENCE = 1e-3
"""Largest difference of a logit, relative to the largest logit, that float32's rounding explains."""
MIN_AGREEMENT = 0.98
"""Share of positions at which the files, in the base's own precision, must choose the token that base + adapter choose."""


class BadMerge(RuntimeError):
    """The merged model does not say what base and adapter say."""


def merge_adapter(base: Path, adapter: Path, rows: Dataset, final: Path, *, base_digest: str) -> Mapping[str, Any]:
    """Merge in float32 on the CPU, save in the base's precision, and compare what was saved.

    Args:
        base_digest: of the base's weights.
        rows: training rows; the first ones are the prompts.

    Returns:
        ``merged`` (its folder), ``merged_max_difference`` (relative, in float32) and ``merged_agreement`` (share of
        positions where the saved files choose the same token).

    Raises:
        BadMerge: either figure is beyond its limit; nothing is published.
    """
    prompts = [torch.tensor([rows[i]["input_ids"][:MAX_TOKENS]]) for i in range(min(NUM_PROMPTS, len(rows)))]
    model = PeftModel.from_pretrained(_float32(base), adapter)
    expected = _logits(model, prompts)
    merged = model.merge_and_unload()
    differences = [
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(_logits(merged, prompts), expected, strict=True)
    ]
    # max() hides a NaN or not by its place.
    difference = math.nan if any(map(math.isnan, differences)) else max(differences)
    if not difference <= MAX_DIFFERENCE:
        raise BadMerge(
            f"the merged model's logits differ by {difference:.2g} of the largest (limit {MAX_DIFFERENCE:g})"
        )

    temporary = final.with_name(".merged.tmp")
    for folder in (temporary, final):
        shutil.rmtree(folder, ignore_errors=True)
    dtype = getattr(AutoConfig.from_pretrained(base), "dtype", None) or torch.float32
    merged.to(dtype).save_pretrained(temporary, safe_serialization=True)
    load_tokenizer(base).save_pretrained(temporary)
    chosen = [logits.argmax(-1) for logits in _logits(_float32(temporary), prompts)]
    same = torch.cat([(a == b.argmax(-1)).flatten() for a, b in zip(chosen, expected, strict=True)])
    agreement = float(same.float().mean())
    if agreement < MIN_AGREEMENT:
        raise BadMerge(
            f"saved as {dtype}, the merged model chooses the token of base + adapter at {agreement:.1%} of {same.numel()} "
            f"positions (limit {MIN_AGREEMENT:.0%}); serve the adapter beside its base instead (training.merge_adapter=false)"
        )
    figures = {"merged_max_difference": difference, "merged_agreement": agreement}
    write_json(temporary / "manifest.json", {"base_weights_sha256": base_digest, **figures})
    publish_folder(temporary, final)
    return {"merged": str(final), **figures}


def _float32(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return model


def _logits(model: PreTrainedModel | PeftModel, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    model.eval()
    with torch.inference_mode():
        return [model(input_ids=prompt).logits for prompt in prompts]
