"""What a run measured besides answers: time, cost, memory, speed, losses. None stands for what was not measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelSpeed:
    """How one model answered.

    Attributes:
        new_tokens_per_s: over all ranks.
        latency_s: percentiles of the seconds from an answer's batch's start to its end: ``p50``, ``p95``, ``p99``.
        peak_memory_gbytes: most memory that a rank has held, in GB (10^9 bytes).
        reference_loss: mean cross-entropy per token of the expected answers, in nats.
        plain_loss: the same of plain conversations without tools, which training does not teach.
        num_memory_retries: batches that had to be halved for want of memory.
    """

    new_tokens_per_s: float | None = None
    latency_s: Mapping[str, float] | None = None
    peak_memory_gbytes: float | None = None
    reference_loss: float | None = None
    plain_loss: float | None = None
    num_memory_retries: int | None = None

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> ModelSpeed:
        """What an inference stage wrote down; an older one may lack some of it."""
        return cls(**{name: manifest.get(name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class StageTime:
    """One stage's attempts together.

    Attributes:
        seconds: from running to ended, failed attempts included.
        num_processes: as wide as the job was.
        uses_gpus: one GPU a process; else processors.
        num_attempts: 0 where an earlier run's result was taken.
        succeeded: the last attempt left its result, or an earlier run's was taken.
    """

    name: str
    seconds: float
    num_processes: int
    uses_gpus: bool
    num_attempts: int
    succeeded: bool


@dataclass(frozen=True)
class Measurements:
    """What gates and report know of a run besides its answers.

    Attributes:
        wall_hours: from the first job's start to the last one's end.
        gpu_hours: GPUs held times hours, over all attempts; None where the run had no GPU.
        process_hours: the same for all processes, on GPUs or not.
        storage_gbytes: the run's own files, in GB (10^9 bytes).
        final_loss: mean training loss over the last tenth of the steps.
        tokens_per_s_per_gpu: median training throughput, padding not counted.
        gpu_utilization, gpu_memory_share: mean over training, and highest share of a GPU's memory held, between 0 and 1.
        has_final_checkpoint: the adapter is there, whole.
        num_out_of_memory: attempts and batches that failed for want of memory.
    """

    stages: tuple[StageTime, ...] = ()
    wall_hours: float | None = None
    gpu_hours: float | None = None
    process_hours: float | None = None
    storage_gbytes: float | None = None
    final_loss: float | None = None
    tokens_per_s_per_gpu: float | None = None
    gpu_utilization: float | None = None
    gpu_memory_share: float | None = None
    has_final_checkpoint: bool = False
    num_out_of_memory: int | None = None
    original: ModelSpeed = ModelSpeed()
    finetuned: ModelSpeed = ModelSpeed()

    @property
    def plain_loss_increase(self) -> float | None:
        """By what share the loss on plain conversations grew: forgetting."""
        before, after = self.original.plain_loss, self.finetuned.plain_loss
        return None if before is None or after is None else after / before - 1
