"""A model that FSDP2 holds in shards: a part of each matrix on every rank, gathered around its use."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter gathered from all ranks, which all must ask for; as it is where it is whole already.

    FSDP2 puts one or the other in a module's place, before its forward pass and after.
    """
    if isinstance(parameter, DTensor):
        gathered: torch.Tensor = parameter.full_tensor()
        return gathered
    return parameter


def drop_gathered(model: nn.Module) -> None:
    """After a forward pass without gradients: FSDP2 keeps what it gathered last, for a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
