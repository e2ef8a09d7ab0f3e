"""How much arithmetic a token of LoRA training takes, for MFU: useful work only, recomputation and padding not counted.

Frozen matrices have a forward product and the gradient of their input (4 operations a parameter and token, not the 6 of full
training), trained ones both and their own gradient (6), frozen ones below the first adapter the forward product alone (2).
Causal attention has 6 operations a token, position before it, and unit of width, halved by the mask
(PaLM, arXiv:2204.02311, appendix B, whose 12 are for attention without a mask).
"""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tasks.models.fp8_base import Fp8Linear

LAYER = re.compile(r"\.layers\.(\d+)\.")


def flops_per_token(model: nn.Module, lengths: Sequence[int]) -> float:
    """Floating-point operations for one useful token, on average over conversations of these lengths (tokens).

    Args:
        model: with its adapter, whole or in shards, with weights or without.
    """
    trained = {
        int(match[1]) for name, p in model.named_parameters() if p.requires_grad and (match := LAYER.search(name))
    }
    first = min(trained, default=0)
    per_token = 0.0
    head = _base(model).get_output_embeddings()
    heads = (head, getattr(head, "base_layer", None))
    for name, part in model.named_modules():
        # The head is counted by its size, below.
        if not isinstance(part, nn.Linear | Fp8Linear) or part in heads:
            continue
        layer = LAYER.search(name)
        is_trained = isinstance(part, nn.Linear) and part.weight.requires_grad
        factor = 6 if is_trained else 2 if layer and int(layer[1]) < first else 4
        per_token += factor * part.in_features * part.out_features
    config = _base(model).config.get_text_config()
    per_token += 4 * config.vocab_size * config.hidden_size
    width: int = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    # A token of a conversation of T tokens looks back at T / 2 on average, and long ones hold more tokens.
    mean_length: float = sum(length * length for length in lengths) / sum(lengths)
    of_layers: float = config.num_hidden_layers - first + first / 3
    total: float = per_token + 6 * mean_length * width * of_layers
    return total


def _base(model: nn.Module) -> Any:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    assert isinstance(base, PreTrainedModel)
    return base
