"""Cross-entropy behind a language-model head that is not trained: two products instead of three, in little memory.

A frozen head needs no gradient of its own, so that the gradient of its input can be computed together with the loss, a few
thousand tokens at a time: no logits stay, and none are computed again in the backward pass.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn.functional import linear

from tasks.models.shards import drop_gathered

TOKENS_AT_A_TIME = 2048
LARGE = 1000.0
"""Logits of such a size meet any cap."""


class FrozenHeadLoss(torch.autograd.Function):
    """Sum of cross-entropies in nats. Use :func:`frozen_head_loss`."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], TOKENS_AT_A_TIME):
            part = slice(start, start + TOKENS_AT_A_TIME)
            loss, of_logits = _loss_and_gradient(linear(hidden[part], weight), targets[part])
            total = total + loss
            # In their place; outside of autocast, which would give them another precision.
            torch.mm(of_logits, weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None


def frozen_head_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the cross-entropy of ``hidden @ weight.T`` with the targets, in nats, as float32.

    Args:
        hidden: (tokens, width), in the precision of the products.
        weight: (vocabulary, width), in the same; gets no gradient.
        targets: (tokens,), each an index into the vocabulary.
    """
    total: torch.Tensor = FrozenHeadLoss.apply(hidden, weight, targets)
    return total


def _of_chunk(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss, and its gradient to the logits in their precision."""
    # Compiled quicker than a sum of exponents and what follows from it.
    log_shares = torch.log_softmax(logits.float(), dim=-1)
    loss = -log_shares.gather(1, targets[:, None]).sum()
    is_target = torch.arange(logits.shape[1], device=logits.device)[None] == targets[:, None]
    return loss, (torch.exp(log_shares) - is_target.float()).to(logits.dtype)


def looks_plain(model: Any) -> bool:
    """As :func:`is_plain_product`, without weights: by the head's kind and the one name that caps have."""
    head = model.get_output_embeddings()
    is_capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None) is not None
    # FSDP2 gives the module a class of its own, which computes as before.
    return type(head).forward is torch.nn.Linear.forward and head.bias is None and not is_capped


def is_plain_product(model: Any) -> bool:
    """Whether a causal language model's logits are its head's matrix product and nothing else.

    False where the head has a bias or an adapter, and where the model bends what comes out of it (Gemma 2 caps its logits).
    A factor, as Cohere's and Granite's, is no matter: what goes into the head may have it as well.
    """
    head = model.get_output_embeddings()
    if not looks_plain(model):
        return False
    attention, is_training = model.config._attn_implementation, model.training
    # Several: what stands for padding may be all zeros.
    ids = torch.arange(min(8, head.weight.shape[0]), device=head.weight.device)[None]
    model.set_attn_implementation("eager")
    model.eval()
    try:
        logits = []
        for factor in (1.0, LARGE):
            leave_out(head, factor)
            with torch.no_grad():
                logits.append(model(input_ids=ids, use_cache=False).logits.float())
    finally:
        del head.forward
        model.train(is_training)
        model.set_attn_implementation(attention)
        drop_gathered(model)
    # Rounding in bfloat16 is 0.4 %; what is capped stays far below.
    return bool((logits[1] - LARGE * logits[0]).norm() < 0.02 * LARGE * logits[0].norm())


def leave_out(head: torch.nn.Module, factor: float = 1.0) -> None:
    """Let a head hand on what it is given, times a factor; ``del head.forward`` undoes it.

    The module stays, with what hangs on its call: FSDP2 gathers its matrix there, with the last norm's.
    """
    head.forward = lambda hidden: hidden if factor == 1 else factor * hidden


def _of_whole_chunk(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A function of its own: what is compiled of one function serves whatever its code takes."""
    return _of_chunk(logits, targets)


@cache
def _compiled(*, is_whole: bool) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    # Not at import: the compiler takes seconds to load.
    compiled: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    compiled = torch.compile(_of_whole_chunk, dynamic=False) if is_whole else torch.compile(_of_chunk, dynamic=True)
    return compiled


def _loss_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # Several passes over the logits become two on a GPU; on a CPU there is nothing to win, and a compiler to need.
    if not logits.is_cuda:
        return _of_chunk(logits, targets)
    # Code for one shape is quicker (0.67 ms instead of 0.96 on an H200), and all chunks but the last have one.
    return _compiled(is_whole=logits.shape[0] == TOKENS_AT_A_TIME)(logits, targets)
