"""Faults that a check does to itself, to prove that its gates find them (``inject``). Without one nothing here does anything."""

import errno
import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import torch

from tasks.contracts.cluster_settings import InjectedFault

SLEEP_S = 0.05
FOREVER_S = 3600.0


@dataclass(frozen=True)
class Faults:
    """What goes wrong on this rank; ``kind`` is None on all ranks but one."""

    kind: str | None

    @classmethod
    def of(cls, inject: dict[str, Any] | None, node: int, process: int) -> "Faults":
        """The fault of this process, if the settings give it one."""
        fault = None if inject is None else InjectedFault(**inject)
        is_here = fault is not None and (fault.node, fault.process) == (node, process)
        return cls(fault.kind if fault is not None and is_here else None)

    def at_start(self) -> None:
        """Before anything is measured."""
        if self.kind == "half_threads":
            processors = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, processors[: max(1, len(processors) // 2)])
            torch.set_num_threads(max(1, torch.get_num_threads() // 2))

    def before_work(self) -> None:
        """Before each repetition of a product or collective."""
        if self.kind == "sleep":
            time.sleep(SLEEP_S)

    def before_collective(self, name: str) -> None:
        """Before the repetitions of one collective at one size."""
        if name != "all_reduce":
            return
        if self.kind == "dead":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "hang":
            time.sleep(FOREVER_S)

    def result(self, tensor: torch.Tensor) -> None:
        """What a collective brought."""
        if self.kind == "corrupt":
            tensor.view(-1)[tensor.numel() // 2] += 1

    def seconds(self, values: list[float]) -> list[float]:
        """Times of a measurement."""
        return [float("nan")] * len(values) if self.kind == "nan" else values

    def version(self, value: str) -> str:
        """A library's version."""
        return f"{value}.wrong" if self.kind == "wrong_version" else value

    def before_write(self, path: str) -> None:
        """Before a file is written.

        Raises:
            OSError: as the filesystem would.
        """
        if self.kind == "read_only":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        if self.kind == "full_disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
