"""Attention over conversations laid end to end, each seeing itself alone, without a package of its own.

Torch's variable-length attention takes the boundaries that TRL's padding-free collator computes, and is registered with
transformers under :data:`PACKED`. Where all conversations of a batch are equally long they are a plain batch, for which
cuDNN's fused attention takes two thirds of the time (H200, 16,384 tokens, 4,096 each: 4.0 ms instead of 6.6 ms forward and
backward in a layer).
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from tasks.models.shards import drop_gathered

PACKED = "proving_ground_packed"
FLEX = "flex_attention"
"""Transformers' own; it finds the boundaries where positions begin again at 0."""
Attention = Literal["varlen", "flex"]
MOST_SEEN_ACROSS = 0.02
"""Of what a model says of one conversation, what may come of another beside it; rounding in bfloat16 is 0.4 %."""
MOST_MOVED = 0.25
"""Of the same, what may come of being alone; models that place it wrongly move by half and more."""
LEFT_OUT = ("softcap", "s_aux", "position_bias")
"""What some models' layers pass to their attention, by transformers' names."""


def implementation(attention: Attention) -> str:
    """The name that transformers knows the setting ``training.attention`` by, after :func:`register`."""
    return FLEX if attention == "flex" else PACKED


def register() -> None:
    """Make :data:`PACKED` known to transformers as an attention implementation.

    Of a mask for it transformers is told nothing, and makes none. Were it told, it would look for the boundaries in the positions
    at every forward pass, for which it waits for the GPU.
    """
    AttentionInterface.register(PACKED, packed_attention)


def check_kept_apart(model: Any) -> None:
    """Let a model pass that reads each of two conversations laid end to end as if it were alone.

    Not all do that can be told where conversations begin: layers with a state that is carried along (Mamba, short convolutions,
    linear attention) go on with the one before, and some count positions by themselves.

    Args:
        model: a causal language model that was told its attention (:func:`implementation`).

    Raises:
        ValueError: it does not, with what to set instead.
    """
    attention, other = ("flex", "varlen") if model.config._attn_implementation == FLEX else ("varlen", "flex")
    instead = (
        f"set training.attention={other}, or training.precision=float32 with training.attention=varlen, in which each "
        "conversation is padded"
    )
    try:
        seen, moved = second_of_two(model)
    except ValueError as error:
        raise ValueError(f"{type(model).__name__}, training.attention={attention}: {error}; {instead}") from error
    # No number is no pass either.
    if not (seen < MOST_SEEN_ACROSS and moved < MOST_MOVED):
        raise ValueError(
            f"{type(model).__name__} does not keep conversations that lie end to end apart with training.attention={attention}: "
            f"the second of two moved by {seen:.1%} when the first was another one, and by {moved:.1%} when it was alone; "
            f"{instead}"
        )


def second_of_two(model: Any) -> tuple[float, float]:
    """How far the second of two conversations laid end to end moves, relative to its size.

    Returns:
        By another conversation in the place of the first, which leaves rounding where they are kept apart; and by being alone,
        which leaves somewhat more of it: products of other shapes add up in another order.
    """
    first, second = 5, 3
    device, is_training = next(model.parameters()).device, model.training
    # In no order, lest something is made of it.
    ids = torch.tensor([[7, 3, 9, 4, 8, 6, 2, 5]], device=device) % model.get_input_embeddings().num_embeddings
    others = torch.cat([ids[:, :first].flip(1), ids[:, first:]], dim=1)
    model.eval()
    try:
        with torch.no_grad():
            together, beside_another, alone = (
                model(**end_to_end(each, lengths), use_cache=False).logits[0, -second:].float()
                for each, lengths in ((ids, (first, second)), (others, (first, second)), (ids[:, first:], (second,)))
            )
    finally:
        model.train(is_training)
        drop_gathered(model)
    size = together.norm()
    return float((together - beside_another).norm() / size), float((together - alone).norm() / size)


def end_to_end(ids: torch.Tensor, lengths: Sequence[int]) -> dict[str, Any]:
    """What TRL's collator tells a model of conversations of such lengths. Args: ids (1, T)."""
    bounds = torch.tensor([0, *lengths], device=ids.device).cumsum(0).to(torch.int32)
    longest = max(lengths)
    return {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(length, device=ids.device) for length in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


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
            f"conversation has {max_length_q})"
        )
    if left_out := sorted(name for name in LEFT_OUT if kwargs.get(name) is not None):
        raise ValueError(f"packed attention has no {', '.join(left_out)}, which this model's layers ask for")
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
        _computed(part[0].transpose(0, 1))
        for part in (query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))
    ]
    output = varlen_attn(
        *tokens, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling, window_size=(-1, 0)
    )
    return output.unsqueeze(0), None


# Compiled it would be so anew for every list of lengths.
@torch.compiler.disable  # type: ignore[untyped-decorator]
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
    return _computed(part[0].unflatten(1, (num, length)).transpose(0, 1))


def _computed(part: torch.Tensor) -> torch.Tensor:
    """The same, where layers are compiled as a result and not as a view of one.

    What is kept for the backward pass lies as it would without a compiler, and a view of something is written twice for that: its
    whole as the compiler has it, then a copy.
    """
    return part + 0 if torch.compiler.is_compiling() else part
