"""Attention over conversations laid end to end, each seeing itself alone, without a package of its own.

Torch's variable-length attention takes the boundaries that TRL's padding-free collator computes, and is registered with
transformers under :data:`PACKED`. Where all conversations of a batch are equally long they are a plain batch, for which
cuDNN's fused attention takes two thirds of the time (H200, 16,384 tokens, 4,096 each: 4.0 ms instead of 6.6 ms forward and
backward in a layer).
"""

from typing import Any, Literal

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

PACKED = "proving_ground_packed"
FLEX = "flex_attention"
"""Transformers' own; it finds the boundaries where positions begin again at 0."""
MOST_SEEN_ACROSS = 0.02
"""Of what a model says of one conversation, what may come of another beside it; rounding in bfloat16 is 0.4 %."""
LEFT_OUT = ("softcap", "s_aux", "position_bias")
"""What some models' layers pass to their attention, by transformers' names."""


def implementation(attention: Literal["varlen", "flex"]) -> str:
    """The name that transformers knows the setting ``training.attention`` by, after :func:`register`."""
    return FLEX if attention == "flex" else PACKED


def register() -> None:
    """Make :data:`PACKED` known to transformers as an attention implementation that needs no mask."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, lambda *args, **kwargs: None)


def check_kept_apart(model: Any) -> None:
    """Let a model pass that keeps conversations laid end to end apart.

    Args:
        model: a causal language model, told its attention.

    Raises:
        ValueError: one moves when the one before is another.
    """
    # No number is no pass either.
    if not (share := seen_across(model)) < MOST_SEEN_ACROSS:
        raise ValueError(
            f"{type(model).__name__} does not keep conversations that lie end to end apart: the second of two moved by "
            f"{share:.1%} when the first was another one; set training.precision=float32, in which each is padded"
        )


def seen_across(model: Any) -> float:
    """How far the second of two conversations laid end to end moves when the first is another one, relative to its size.

    0, or rounding, where the model keeps them apart. Not all do that can be told where they begin: layers with a state that is
    carried along (Mamba, short convolutions, linear attention) go on with the one before.

    Args:
        model: a causal language model, told its attention.
    """
    lengths, device, is_training = (5, 3), next(model.parameters()).device, model.training
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    names = ("cu_seq_lens_q", "cu_seq_lens_k"), ("max_length_q", "max_length_k")
    told = dict.fromkeys(names[0], bounds) | dict.fromkeys(names[1], max(lengths))
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    # In no order, lest something is made of it.
    ids = torch.tensor([[7, 3, 9, 4, 8, 6, 2, 5]], device=device)
    others = torch.cat([ids[:, : lengths[0]] + 11, ids[:, lengths[0] :]], dim=1)
    model.eval()
    try:
        with torch.no_grad():
            second, moved = (
                model(input_ids=each, position_ids=positions, use_cache=False, **told).logits[0, lengths[0] :].float()
                for each in (ids, others)
            )
    finally:
        model.train(is_training)
    return float((second - moved).norm() / second.norm())


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each conversation.

    Args:
        query: (1, query heads, T, head size); key and value with as many heads or fewer.
        cu_seq_lens_q: (N + 1,), where each of the N conversations begins, and T; int32.
        max_length_q: the longest conversation's length.

    Returns:
        (1, T, query heads, head size).

    Raises:
        ValueError: the boundaries are missing, or something is asked for that would be left out: dropout, a sliding window,
            capped scores, sinks, a bias by position.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError("packed attention needs the conversations' boundaries (cu_seq_lens_q, max_length_q)")
    window = kwargs.get("sliding_window")
    if dropout or (window is not None and window < max_length_q):
        raise ValueError(
            f"packed attention has neither dropout ({dropout}) nor a sliding window ({window} tokens, the longest "
            f"conversation has {max_length_q}); for training, training.attention=flex has windows"
        )
    if left_out := sorted(name for name in LEFT_OUT if kwargs.get(name) is not None):
        raise ValueError(
            f"packed attention has no {', '.join(left_out)}, which this model's layers ask for; for training, "
            "training.attention=flex has"
        )
    num_tokens, num_conversations = query.shape[2], cu_seq_lens_q.shape[0] - 1
    if num_conversations * max_length_q == num_tokens:
        q, k, v = (_as_batch(part, num_conversations, max_length_q) for part in (query, key, value))
        output = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2).reshape(1, num_tokens, query.shape[1], -1), None
    if query.device.type != "cuda" or query.dtype == torch.float32:
        return _one_by_one(query, key, value, cu_seq_lens_q, scaling), None
    # Torch 2.11's takes as many key heads as query heads.
    groups = query.shape[1] // key.shape[1]
    tokens = [
        part[0].transpose(0, 1)
        for part in (query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))
    ]
    output = varlen_attn(
        *tokens, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling, window_size=(-1, 0)
    )
    return output.unsqueeze(0), None


def _one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Where the variable-length kernel does not run: on a processor, and in float32."""
    lengths = bounds.diff().tolist()
    parts = zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
    outputs = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True) for q, k, v in parts
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _as_batch(part: torch.Tensor, num: int, length: int) -> torch.Tensor:
    """(1, heads, num * length, size) to (num, heads, length, size)."""
    return part[0].unflatten(1, (num, length)).transpose(0, 1)
