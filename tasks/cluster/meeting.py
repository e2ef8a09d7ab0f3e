"""Where all ranks of a stage meet between measurements, so that one which hangs is named and none starts early.

Agreements go over a gloo group on the processors; what is measured goes over the device's own backend.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tasks.cluster.recorder import Recorder
from tasks.contracts.attempt import Attempt
from tasks.contracts.cluster_report import RankRecord

QUEUE_CYCLES = 4_000_000
"""Clock cycles for which a GPU is kept busy while calls are launched, about 2 ms; 32 launches from Python take 0.8 to 1.5 ms."""


class MissingRanks(RuntimeError):
    """Some ranks did not come to a measurement."""


@dataclass(frozen=True)
class Meeting:
    """This rank among all.

    Attributes:
        node: number of the node, as the scheduler counts.
        process: number of the process on its node.
        device: what it measures.
        recorder: what it leaves.
    """

    rank: int
    world_size: int
    node: int
    process: int
    host: str
    device: torch.device
    control: Any
    limit_s: float
    recorder: Recorder

    @classmethod
    def join(cls, attempt: Attempt, limit_s: float, *, devices: bool = True) -> "Meeting":
        """Meet all ranks of the job.

        Args:
            devices: use GPUs where there are any; off: look at them only, from the processors.
        """
        rank, process = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
        node, host = _node(), os.environ.get("NODE_NAME") or socket.gethostname()
        record = RankRecord(
            rank=rank, world_size=int(os.environ["WORLD_SIZE"]), node=node, process=process, host=host,
            doing="meeting the other ranks", step=0, scheduler_node=_scheduler_node(),
        )  # fmt: skip
        recorder = Recorder(attempt.folder, record)
        is_gpu = devices and torch.cuda.is_available()
        device = torch.device("cuda", process) if is_gpu else torch.device("cpu")
        if is_gpu:
            torch.cuda.set_device(device)
        timeout = timedelta(seconds=limit_s)
        dist.init_process_group("nccl" if is_gpu else "gloo", timeout=timeout, device_id=device if is_gpu else None)
        control = dist.new_group(backend="gloo", timeout=timeout)
        return cls(rank, dist.get_world_size(), node, process, host, device, control, limit_s, recorder)

    @property
    def is_gpu(self) -> bool:
        """Whether GPUs are measured."""
        return bool(self.device.type == "cuda")

    def begin(self, what: str) -> None:
        """Wait for all ranks before a measurement.

        Raises:
            MissingRanks: on rank 0, naming those that did not come in time.
        """
        self.recorder.begin(what)
        try:
            dist.monitored_barrier(self.control, timeout=timedelta(seconds=self.limit_s), wait_all_ranks=True)
        except RuntimeError as error:
            raise MissingRanks(
                f"waited {self.limit_s:g} s for all {self.world_size} ranks before {what}: {str(error).splitlines()[0]}"
            ) from error

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, in their order; it travels as JSON."""
        data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=self.control)
        longest = int(max(sizes))
        padded = torch.nn.functional.pad(data, (0, longest - len(data)))
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(parts, padded, group=self.control)
        return [
            json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(parts, sizes, strict=True)
        ]  # fmt: skip

    def sync(self) -> None:
        """Wait for what the device has queued."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def timed(
        self, work: Callable[[], object], repeats: int, before: Callable[[], object] = lambda: None, *, calls: int = 1
    ) -> list[float]:
        """Seconds of each repetition on this rank: between events on a GPU, by the clock on a processor.

        Args:
            before: done before each, outside of the time.
            calls: of ``work`` in a repetition, one right behind the other. On a GPU they are launched while it is busy with
                something else: a small message is over before Python has launched the next, and the processor would be what
                is measured (1 MiB takes NCCL 14 us, a launch 25 us on one host and 45 us on another).
        """
        if not self.is_gpu:
            seconds = []
            for _ in range(repeats):
                before()
                began = time.perf_counter()
                for _ in range(calls):
                    work()
                seconds.append(time.perf_counter() - began)
            return seconds
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start, end in pairs:
            before()
            if calls > 1:
                torch.cuda._sleep(QUEUE_CYCLES)
            start.record()
            for _ in range(calls):
                work()
            end.record()
        self.sync()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def leave(self) -> None:
        """Close the groups."""
        self.recorder.done()
        dist.destroy_process_group()


def _scheduler_node() -> str | None:
    """The scheduler's name of this node, by which it can be drained; a host may be called otherwise."""
    return os.environ.get("SLURMD_NODENAME") or os.environ.get("NODE_NAME") or None


def _node() -> int:
    """The scheduler's number of this node, the same that names its log."""
    names: Sequence[str] = ("NODE_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX", "GROUP_RANK")
    return int(next(os.environ[name] for name in names if os.environ.get(name)))
