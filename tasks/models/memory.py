"""Memory of this rank's device: how much was held at most, and whether an error means that there was too little."""

import gc
import resource

import torch

from tasks.contracts.memory_errors import says_out_of_memory
from tasks.models.load import device


def is_out_of_memory(error: BaseException) -> bool:
    """Torch has one type of error for GPUs and none for the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and says_out_of_memory(str(error))


def free_memory() -> None:
    """Give back what nothing uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory_gbytes() -> float:
    """Most memory this rank has held, in GB (10^9 bytes): of its GPU, or of the process where there is none."""
    if device().type == "cuda":
        return float(torch.cuda.max_memory_allocated()) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
