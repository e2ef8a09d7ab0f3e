"""On a CPU, TRL's trainer with a loss that projects the answers only, in one product."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from trl import SFTTrainer

from tasks.dataset.stored import IGNORED

EAGER_ATTENTION_TOKENS = 512
"""Up to this length plain products are the faster attention on a CPU (of the demo's model a step of 320 tokens takes 2.0 s
instead of 2.3 s, of 256 1.8 instead of 1.9); beyond it they are slower, and their matrices of scores take memory (of 768 tokens
1.2 GB more)."""


class AnswerOnlyTrainer(SFTTrainer):
    """:class:`~trl.SFTTrainer` that leaves positions without a label out before the language-model head.

    TRL 1.16 does so where Triton runs. Elsewhere its head takes every position, in float32 tiles that are cast from the
    weights two times a step (``trl/trainer/utils.py``, ``_fused_forward``): with a vocabulary of 49,152 and prompts
    three times as long as the answers that was 44 % of a step on a CPU. Loss and gradient are the same, to rounding where
    products are bfloat16; a test holds them so. Entropy and token accuracy, which TRL gathers from all ranks at every
    step, are not computed.
    """

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Cross-entropy in nats over ``labels`` (B, T), summed over this rank and divided as :class:`Trainer` asks."""
        if return_outputs:
            raise NotImplementedError("this trainer evaluates nothing: predictions are a stage of their own")
        # Position t predicts the token at t + 1.
        targets = inputs["labels"][:, 1:]
        answers = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
        self._attend_by_length(inputs["input_ids"])
        context = {name: value for name, value in inputs.items() if name not in ("labels", "seq_idx")}
        logits = model(**context, use_cache=False, logits_to_keep=answers).logits  # (B, len(answers), vocabulary)
        total = cross_entropy(
            logits.flatten(0, 1).float(), targets[:, answers].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return per_answer(self, total, (targets != IGNORED).sum(), num_items_in_batch)

    def _attend_by_length(self, tokens: torch.Tensor) -> None:
        """The attention that is faster for a micro-batch of tokens (B, T), where it is as exact.

        In bfloat16 plain products round the scores before the softmax: gradients of a few rows moved by a tenth.
        """
        if tokens.device.type != "cpu" or self.args.bf16:
            return
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        wanted = "eager" if tokens.shape[1] <= EAGER_ATTENTION_TOKENS else "sdpa"
        if base.config._attn_implementation != wanted:
            base.set_attn_implementation(wanted)


def per_answer(
    trainer: SFTTrainer, total: torch.Tensor, num_answers: torch.Tensor | int, num_items_in_batch: torch.Tensor | None
) -> torch.Tensor:
    """A loss summed over this rank's answers, divided as :class:`~transformers.Trainer` asks.

    Args:
        num_answers: answer tokens of this micro-batch.
        num_items_in_batch: those of the global batch, over all ranks, whose gradients are then averaged; None: by itself.
    """
    if num_items_in_batch is None:
        return total / torch.as_tensor(num_answers).clamp(min=1)
    return total * trainer.accelerator.num_processes / torch.as_tensor(num_items_in_batch).clamp(min=1)
