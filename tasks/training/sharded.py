"""The base model sharded over all ranks (FSDP2), the adapter whole on each: for models that do not fit one GPU.

What is large in LoRA is the frozen base, and it needs no gradient: FSDP2 gathers a layer's matrices before it is used and
drops them after. The adapter, its gradients and AdamW's moments are a hundredth of it and stay plain tensors on every rank.
Checkpoints and results are therefore those of data parallelism, and a run goes on from one strategy with the other, on any
number of ranks: a sharded state to save, gather or convert does not exist.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from trl import SFTTrainer

from tasks.models.fp8_base import Fp8Linear


class Sharded(SFTTrainer):
    """A mixin before a :class:`~trl.SFTTrainer` on a model that ``from_pretrained`` sharded (``DistributedConfig.fsdp_size``)."""

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """One adapter on all ranks. transformers would average each gradient as it comes, which gloo cannot."""
        with torch.no_grad():
            for parameter in _trained(model):
                dist.broadcast(parameter, src=0)

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """Called once an optimiser step, after the last micro-batch: average the gradients over the ranks, then clip."""
        gradients = [p.grad for p in _trained(model) if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))
        norm: torch.Tensor = super()._clip_grad_norm(model)
        return norm


def held_parameters(model: nn.Module) -> int:
    """How many parameters this rank holds: of a sharded one its own part."""
    in_fp8: int = sum(p.in_features * p.out_features for p in model.modules() if isinstance(p, Fp8Linear))
    parameters: int = sum(_held(parameter).numel() for parameter in model.parameters())
    return in_fp8 + parameters


def _held(parameter: nn.Parameter) -> torch.Tensor:
    if isinstance(parameter, DTensor):
        local: torch.Tensor = parameter.to_local()
        return local
    # DeepSpeed's part; between uses the parameter itself is empty.
    part: torch.Tensor = getattr(parameter, "ds_tensor", parameter)
    return part


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
