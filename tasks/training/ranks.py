"""The ranks of one attempt: what they agree on, and who is missing when one is.

Everything here goes through a gloo group on the CPU, so that no agreement waits for what a GPU has queued.
"""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

START_LIMIT_S = 3600.0
"""For downloading and loading a model; training steps have a limit of their own, which the watchdog keeps."""


class MissingRanks(RuntimeError):
    """Some ranks did not come to where all must be."""


class CannotMeet(RuntimeError):
    """The ranks cannot talk to each other."""


@dataclass(frozen=True)
class Ranks:
    """This rank among all."""

    rank: int
    world_size: int
    group: Any

    @classmethod
    def join(cls, limit_s: float) -> "Ranks":
        """Meet all ranks of this attempt (torchrun's environment says where).

        Args:
            limit_s: longest collective of training; the watchdog ends the attempt before the groups' own limits do.

        Raises:
            CannotMeet: the network between the ranks, or what moves data over it, does not work.
        """
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        timeout = timedelta(seconds=max(2 * limit_s, START_LIMIT_S))
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        try:
            dist.init_process_group(backend, timeout=timeout)
            group = dist.new_group(backend="gloo", timeout=timeout)
            # Both connect at their first collective: now, and not when a model has been loaded for an hour.
            probe = torch.zeros(1, device="cuda" if backend == "nccl" else "cpu")
            dist.all_reduce(probe)
            dist.all_reduce(torch.zeros(1), group=group)
            probe.item()
        except RuntimeError as error:
            of_nccl = "" if backend == "gloo" else "; NCCL_DEBUG=INFO in the pool's env tells what NCCL tried"
            raise CannotMeet(
                f"rank {os.environ.get('RANK')} on {socket.gethostname()} cannot reach the other ranks over {backend}: "
                f"{str(error).strip()}. Look at pool.network, at the interfaces named in {_named_interfaces()}, and at the "
                f"firewall between the nodes{of_nccl}"
            ) from error
        return cls(dist.get_rank(), dist.get_world_size(), group)

    def barrier(self, where: str, limit_s: float) -> None:
        """Wait for all ranks.

        Raises:
            MissingRanks: on rank 0, with the ranks that did not come within the limit; on others, that rank 0 did not.
        """
        try:
            dist.monitored_barrier(self.group, timeout=timedelta(seconds=limit_s), wait_all_ranks=True)
        except RuntimeError as error:
            raise MissingRanks(
                f"waited {limit_s:g} s for all {self.world_size} ranks, {where}: {str(error).splitlines()[0]}; "
                "the logs of the nodes of the missing ranks say what they did last"
            ) from error

    def from_rank_0(self, values: Sequence[int]) -> list[int]:
        """Rank 0's values, on every rank; the others' count and are not looked at."""
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.broadcast(tensor, src=0, group=self.group)
        return [int(value) for value in tensor.tolist()]

    def mean(self, value: float) -> float:
        """The mean over all ranks."""
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(tensor, group=self.group)
        return float(tensor.item()) / self.world_size

    def gather(self, values: Sequence[int]) -> "Gathering":
        """Begin to collect one row of numbers from every rank; all ranks give as many."""
        own = torch.tensor(values, dtype=torch.int64)
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        return Gathering(parts, dist.all_gather(parts, own, group=self.group, async_op=True))

    def leave(self) -> None:
        """Close the groups."""
        dist.destroy_process_group()


@dataclass(frozen=True)
class Gathering:
    """What :meth:`Ranks.gather` began."""

    parts: list[torch.Tensor]
    work: Any

    def wait(self) -> list[list[int]]:
        """The rows of all ranks, in their order."""
        self.work.wait()
        return [part.tolist() for part in self.parts]


def _named_interfaces() -> str:
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA")
    return (
        ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ) or f"none of {', '.join(names)}"
    )
