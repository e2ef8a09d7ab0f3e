"""Conversations per GPU at a time, and whether activations are recomputed, from the memory that there is.

What a token costs is counted, not guessed: the model is built on torch's ``meta`` device, which holds no data, and every tensor
that its forward pass keeps for the backward pass is added up. Compiled layers keep less than these, by a share that was
measured of one model; where memory runs out all the same, another attempt with less follows (``micro_batch.py``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

from tasks.contracts.settings import TrainingSettings
from tasks.models.load import Resolved, device
from tasks.training.adapter import lora_config
from tasks.training.frozen_head import TOKENS_AT_A_TIME, looks_plain
from tasks.training.order import balanced

ENOUGH_TOKENS = 16_384
"""A GPU's products are as fast as they get with so many tokens at a time; more would only take memory."""
SHARE_OF_FREE = 0.9
"""The rest is for NCCL's buffers, libraries' workspaces, and holes between tensors."""
BYTES_PER_TRAINED = 4 + 4 + 4 + 8 + 2
"""Of an adapter's parameter: itself, its gradient, DDP's copy of that, AdamW's moments, and the copy that is multiplied."""
BYTES_PER_LOGIT = 2 + 4 + 4
"""Of the few thousand tokens whose loss is computed together."""
COMPILED_KEEP = 0.8
"""Of what is counted, compiled layers keep less: of Llama 3.1 8B's 6.3 MB a token 4.4 in documents and 4.8 in conversations
(one H200, torch 2.11, peaks of 94 and 101 GB)."""
RECOMPUTED = (False, 4, 2, True)
"""What ``auto`` tries, the fastest first: nothing, every fourth layer, every second, all."""
COUNTED_TOKENS = 64
COUNTING = "proving_ground_counting"


@dataclass(frozen=True)
class Footprint:
    """What training takes of one GPU, in bytes.

    Attributes:
        fixed: whatever the micro-batch is: weights, gradients, moments, a part of the logits.
        per_token: kept of each token of a micro-batch for the backward pass.
        per_token_recomputed: the same where every layer keeps its input only, one layer's own while it is recomputed.
        per_token_of_layer: kept of each token by one layer.
        is_padded: conversations are filled up to the longest of their micro-batch, as everywhere but in packed training.
    """

    fixed: float
    per_token: float
    per_token_recomputed: float
    per_token_of_layer: float
    is_padded: bool = False

    def of_token(self, gradient_checkpointing: bool | int) -> float:
        """Kept of each token with this setting."""
        if not gradient_checkpointing:
            return self.per_token
        share = 1 / gradient_checkpointing
        # One layer's own is there once more while it is recomputed, beside those that are kept.
        return (1 - share) * (self.per_token + self.per_token_of_layer) + share * self.per_token_recomputed


@dataclass(frozen=True)
class MicroBatch:
    """The choice, and the figures behind it in words."""

    per_device_batch_size: int
    gradient_checkpointing: bool | int
    why: str


def in_words(gradient_checkpointing: bool | int) -> str:
    """What becomes of the activations."""
    if gradient_checkpointing in (False, True):
        return "activations recomputed" if gradient_checkpointing else "activations kept"
    return f"activations of one layer in {gradient_checkpointing} recomputed"


def on_processor(settings: TrainingSettings) -> MicroBatch:
    """What ``auto`` means where there is no GPU."""
    wanted, recompute = settings.per_device_batch_size, settings.gradient_checkpointing
    size, recompute = 1 if wanted == "auto" else wanted, False if recompute == "auto" else recompute
    return MicroBatch(
        size, recompute, f"{size} at a time, {in_words(recompute)}: a processor's memory is not planned for"
    )


def choose_micro_batch(
    settings: TrainingSettings,
    lengths: Sequence[int],
    order: Sequence[int],
    world_size: int,
    *,
    footprint: Footprint,
    free_bytes: float,
) -> MicroBatch:
    """The fastest way to take each rank's share of the global batch in the memory there is; what is set stays as set.

    No more is recomputed (:data:`RECOMPUTED`) than it takes for one conversation to fit; then as many at a time as fit, up to
    :data:`ENOUGH_TOKENS`. The global batch is the same with any choice.

    Args:
        lengths: tokens of each row.
        order: the rows of all steps, of which successive ones make a micro-batch; packed, :func:`balanced` ones.
        free_bytes: of one GPU, before anything is loaded.
    """
    share, wanted = settings.global_batch_size // world_size, settings.per_device_batch_size
    sizes = [size for size in range(1, share + 1) if share % size == 0] if wanted == "auto" else [wanted]
    batches = {}
    for size in sizes:
        taken = order if footprint.is_padded else balanced(
            order, lengths, global_batch_size=settings.global_batch_size, micro_batch_size=size
        )  # fmt: skip
        batches[size] = np.asarray(lengths)[np.asarray(taken)].reshape(-1, size)
    tokens = {
        size: int((size * batch.max(1) if footprint.is_padded else batch.sum(1)).max())
        for size, batch in batches.items()
    }
    # Speed is a matter of the usual micro-batch, memory of the largest.
    enough = next((size for size in sizes if batches[size].sum(1).mean() >= ENOUGH_TOKENS), sizes[-1])
    asked = settings.gradient_checkpointing
    choices = RECOMPUTED if asked == "auto" else (asked,)
    needed = {
        (size, recompute): footprint.fixed + tokens[size] * footprint.of_token(recompute)
        for recompute in choices
        for size in sizes
        if size <= enough
    }
    budget = SHARE_OF_FREE * free_bytes
    fitting = [key for key, num_bytes in needed.items() if num_bytes <= budget]
    # The first way that fits at all, with the most at a time; else what takes least.
    chosen = (
        min(fitting, key=lambda key: (choices.index(key[1]), -key[0]))
        if fitting
        else min(needed, key=needed.__getitem__)
    )
    size, recompute = chosen
    why = (
        f"{size} of {share} conversations at a time, {in_words(recompute)}: at most "
        f"{tokens[size]:,} tokens and about {needed[chosen] / 1e9:.1f} GB of {free_bytes / 1e9:.1f} GB free"
    )
    if not fitting:
        why += f", which is more than the {SHARE_OF_FREE:.0%} to count on; tried all the same"
    return MicroBatch(size, recompute, why)


def free_bytes() -> int:
    """Memory of this rank's GPU that nobody uses; 0 on a processor."""
    if device().type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device())
    return int(free)


def footprint_of(model_folder: Path, settings: TrainingSettings, precision: Resolved, num_shards: int) -> Footprint:
    """What one GPU holds in training this model as set.

    Args:
        num_shards: ranks among which the base is divided; 1: each holds it whole.
    """
    config = AutoConfig.from_pretrained(model_folder)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    _register_counting()
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=COUNTING)
        model: Any = get_peft_model(base, lora_config(settings.lora, base))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    text = config.get_text_config()
    # A layer is whole while it is used, and the next one comes meanwhile; the head is from its use to the backward pass.
    head = text.vocab_size * text.hidden_size * dtype.itemsize
    whole = 2 * frozen / text.num_hidden_layers + head if num_shards > 1 else 0.0
    is_packed = precision == "bfloat16"
    is_compiled = settings.strategy != "zero3" and is_packed
    # With a head that is no more than a product the loss is computed of a few thousand tokens at a time, otherwise of all at
    # once; a head in shards is gathered for it.
    in_parts = settings.strategy != "zero3" and is_packed and looks_plain(model.get_base_model())
    logits = text.vocab_size * BYTES_PER_LOGIT
    # Adapters are multiplied in the base's precision.
    kept = kept_bytes(model.to(dtype), COUNTED_TOKENS) / COUNTED_TOKENS
    # Layers below the first adapter keep nothing.
    num_trained_layers = text.num_hidden_layers - settings.lora.first_layer
    inputs = text.num_hidden_layers * text.hidden_size * dtype.itemsize
    return Footprint(
        fixed=frozen / num_shards
        + whole
        + trained * BYTES_PER_TRAINED
        + (TOKENS_AT_A_TIME * logits if in_parts else 0),
        per_token=kept * (COMPILED_KEEP if is_compiled else 1) + (0 if in_parts else logits),
        per_token_recomputed=inputs + kept / num_trained_layers + (0 if in_parts else logits),
        per_token_of_layer=kept / num_trained_layers,
        is_padded=not is_packed,
    )


def kept_bytes(model: Any, num_tokens: int) -> int:
    """Bytes that the decoder's forward pass keeps for its backward pass, of one conversation; parameters do not count."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in parameters:
            # Held, so that no other storage gets its place.
            kept[storage] = tensor
        return tensor

    ids = torch.zeros((1, num_tokens), dtype=torch.long, device=next(model.parameters()).device)
    # A mask that is whole already: transformers would look into the positions for one, and there are none to look into.
    mask = torch.zeros((1, 1, num_tokens, num_tokens), device=ids.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.train().get_base_model().get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _register_counting() -> None:
    AttentionInterface.register(COUNTING, _counting_attention)
    AttentionMaskInterface.register(COUNTING, lambda *args, **kwargs: None)


def _counting_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Keeps what the packed attention's kernel keeps; computes nothing on the ``meta`` device.

    Args:
        query: (1, query heads, T, head size); key and value with as many heads or fewer.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    output = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)[0]
    return output.transpose(1, 2).contiguous(), None
