"""Copies of tensors in the processors' memory, quickly enough not to hold training up.

A GPU writes slowly into memory that the system may move, and memory is slow to get: of the 2 GB of an 8B model's adapter each
takes longer than ten copies. So the memory is pinned, taken before training, and kept from one checkpoint to the next.
"""

from collections.abc import Mapping

import torch

ALIGNMENT = 64
"""Bytes; a copy begins where any type and any vector instruction may."""


class CopyOff:
    """One piece of memory for all copies."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def reserve(self, tensors: Mapping[str, torch.Tensor], *, times: int = 1) -> None:
        """Take memory for copies of so many times these tensors, where there is not enough."""
        needed = times * sum(map(_room, tensors.values()))
        if needed > self._memory.numel():
            # The old one is given back before the new one is taken.
            self._memory = torch.empty(0, dtype=torch.uint8)
            self._memory = torch.empty(needed, dtype=torch.uint8, pin_memory=torch.cuda.is_available())

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors' values, by the same names, on the CPU; valid until the next call."""
        self.reserve(tensors)
        copies, start = {}, 0
        for name, tensor in tensors.items():
            place = self._memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies[name] = place.copy_(tensor.detach(), non_blocking=True)
            start += _room(tensor)
        if any(tensor.is_cuda for tensor in tensors.values()):
            # They were only begun.
            torch.cuda.synchronize()
        return copies


def _room(tensor: torch.Tensor) -> int:
    size: int = tensor.nbytes
    return -(-size // ALIGNMENT) * ALIGNMENT
