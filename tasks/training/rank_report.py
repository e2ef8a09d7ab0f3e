"""What each rank tells of itself with every step: who is slow, who waits for rows, what its node moves.

The figures are whole numbers and ride in the gathering that the ranks hold at every step anyway (``elastic.py``), so that
knowing costs no collective of its own.
"""

import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import psutil
import torch

from tasks.hardware.telemetry import Sample, Sampler

MOST_BEHIND = 8
"""Steps; marks of more are forgotten, the oldest first."""
SLOW = 1.2
"""A rank whose own work on a token takes so many times the median's is named in the log."""


@dataclass(frozen=True)
class RankReport:
    """One rank's figures of the step before; 0 where there are none.

    Attributes:
        signal: the request to leave that reached it.
        work_us: from the step's first row to the end of its last forward pass, before it needs the others.
        work_tokens: what it worked on then; conversations differ in length, and who has the longer ones is not slow.
        wait_us: for rows.
        network_kbytes: what its node sent and received since the step before; of the node's first rank only.
        storage_kbytes: what this process read from and wrote to storage.
        gpu_use_percent, gpu_memory_permille, gpu_power_watts, gpu_temperature_celsius: means over the last second or so.
    """

    signal: int
    work_us: int
    work_tokens: int
    wait_us: int
    network_kbytes: int
    storage_kbytes: int
    gpu_use_percent: int = 0
    gpu_memory_permille: int = 0
    gpu_power_watts: int = 0
    gpu_temperature_celsius: int = 0

    @classmethod
    def read(cls, numbers: Sequence[int]) -> tuple["RankReport", list[int]]:
        """The report at the head of what a rank sent, and the rest."""
        size = len(fields(cls))
        return cls(*numbers[:size]), list(numbers[size:])

    def numbers(self) -> list[int]:
        """As it is sent."""
        return list(astuple(self))


@dataclass
class _Work:
    """A step's tokens, and marks where the work on them begins and ends."""

    tokens: int
    first: Any
    last: Any = None


class RankClock:
    """Times this rank's own part of a step, on the device that does it."""

    def __init__(self, *, local_rank: int, gpu: Sampler) -> None:
        self._is_first = local_rank == 0
        self._is_gpu = torch.cuda.is_available()
        self._gpu, self._gpu_figures = gpu, (0, 0, 0, 0)
        # Of steps whose end nobody has seen yet: a GPU runs behind by a step or two.
        self._open: deque[_Work] = deque(maxlen=MOST_BEHIND)
        self._work_us = self._work_tokens = self._wait_us = 0
        self._process = psutil.Process()
        self._moved = self._counters()

    def waiting(self, rows: Iterator[Any]) -> Iterator[Any]:
        """The same rows; the time until each comes is counted."""
        self._wait_us = 0
        while True:
            began = time.perf_counter()
            try:
                row = next(rows)
            except StopIteration:
                return
            finally:
                self._wait_us += round((time.perf_counter() - began) * 1e6)
            yield row

    def begin(self, num_tokens: int) -> None:
        """The step's rows are there, with so many tokens."""
        self._open.append(_Work(num_tokens, self._mark()))

    def end(self) -> None:
        """The last forward pass of the step is over (on a GPU: is queued)."""
        self._open[-1].last = self._mark()

    def report(self, signal: int) -> RankReport:
        """Of the last step that is over; a GPU that has not finished one yet is not waited for."""
        while self._open and (us := self._taken_us(self._open[0])) is not None:
            self._work_us, self._work_tokens = us, self._open.popleft().tokens
        before, self._moved = self._moved, self._counters()
        network, storage = ((now - then) // 1000 for now, then in zip(self._moved, before, strict=True))
        if self._gpu.error is not None:
            # Old figures must not look like new ones.
            self._gpu_figures = (0, 0, 0, 0)
        elif samples := self._gpu.take():
            self._gpu_figures = (
                _mean(samples, "use_percent"),
                _mean(samples, "memory_share", 1000),
                _mean(samples, "power_watts"),
                _mean(samples, "temperature_celsius"),
            )
        moved = max(0, network), max(0, storage)
        return RankReport(signal, self._work_us, self._work_tokens, self._wait_us, *moved, *self._gpu_figures)

    def _taken_us(self, work: "_Work") -> int | None:
        if work.last is None or (self._is_gpu and not work.last.query()):
            return None
        taken_us: float = work.first.elapsed_time(work.last) * 1e3 if self._is_gpu else (work.last - work.first) * 1e6
        return round(taken_us)

    def _mark(self) -> Any:
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _counters(self) -> tuple[int, int]:
        moved = psutil.net_io_counters() if self._is_first else None
        used = self._process.io_counters()
        return (moved.bytes_sent + moved.bytes_recv if moved else 0), used.read_bytes + used.write_bytes


def _mean(samples: Sequence[Sample], name: str, scale: float = 1) -> int:
    return round(scale * sum(sample[name] for sample in samples) / len(samples))


class RankReports:
    """On rank 0: the reports since the last logged point.

    Attributes:
        checkpoint_s: for how long training has been held up by all checkpoints.
    """

    def __init__(self) -> None:
        self._steps: list[Sequence[RankReport]] = []
        self._began = time.perf_counter()
        self.checkpoint_s = 0.0
        self._checkpoint_s_told = 0.0

    def add(self, reports: Sequence[RankReport]) -> None:
        """Of one step, all ranks' in their order."""
        self._steps.append(reports)

    def take(self) -> tuple[dict[str, float], str]:
        """The metrics of the window that ends now, and words about a rank that stands out, or none."""
        now = time.perf_counter()
        seconds, self._began = now - self._began, now
        steps, self._steps = self._steps, []
        held, self._checkpoint_s_told = self.checkpoint_s - self._checkpoint_s_told, self.checkpoint_s
        metrics = {"train/checkpoint_held_seconds": held} if held else {}
        if not steps:
            return metrics, ""
        ranks = list(zip(*steps, strict=True))
        on_a_token = [sum(r.work_us for r in rank) / max(1, sum(r.work_tokens for r in rank)) for rank in ranks]
        slowest = max(range(len(ranks)), key=on_a_token.__getitem__)
        # The lower median: of two ranks the slow one is compared with the other.
        median = sorted(on_a_token)[(len(ranks) - 1) // 2]
        metrics |= {
            "train/data_wait_seconds": max(sum(r.wait_us for r in rank) for rank in ranks) / len(steps) / 1e6,
            "train/network_mbytes_per_s": sum(r.network_kbytes for rank in ranks for r in rank) / 1e3 / seconds,
            "train/storage_mbytes_per_s": sum(r.storage_kbytes for rank in ranks for r in rank) / 1e3 / seconds,
        }
        metrics |= _of_gpus(ranks)
        if not median or len(ranks) == 1:
            return metrics, ""
        ratio = on_a_token[slowest] / median
        metrics |= {"train/slowest_rank": slowest, "train/slowest_rank_work_ratio": ratio}
        metrics |= {f"rank/{rank:03d}/work_us_per_token": taken for rank, taken in enumerate(on_a_token)}
        return (
            metrics,
            "" if ratio < SLOW else f"rank {slowest} is slow: its work on a token takes {ratio:.2f} times the others'",
        )


def _of_gpus(ranks: Sequence[Sequence[RankReport]]) -> dict[str, float]:
    """Of each GPU and of all: what is bounded (memory, temperature) by the highest, the rest by the mean."""
    # Before the driver's first answer a report has none.
    ranks = [[report for report in rank if report.gpu_memory_permille] for rank in ranks]
    if not all(ranks):
        return {}
    metrics: dict[str, float] = {}
    for name, field, scale, of_all in (
        ("utilization", "gpu_use_percent", 1e-2, statistics.mean),
        ("memory_share", "gpu_memory_permille", 1e-3, max),
        ("power_watts", "gpu_power_watts", 1, statistics.mean),
        ("temperature_celsius", "gpu_temperature_celsius", 1, max),
    ):
        means = [scale * statistics.mean(getattr(report, field) for report in rank) for rank in ranks]
        metrics |= {f"rank/{number:03d}/gpu_{name}": mean for number, mean in enumerate(means)}
        metrics[f"gpu/{name}"] = of_all(means)
    return metrics
