"""What a finished run's folder tells of time, cost, memory and speed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.contracts.files import read_json
from tasks.contracts.job import STARTS
from tasks.contracts.measurements import Measurements, ModelSpeed, StageTime
from tasks.contracts.memory_errors import says_out_of_memory
from tasks.contracts.run_folder import STAGES, RunFolder

GPU_UTILIZATION, GPU_MEMORY = "gpu/utilization", "gpu/memory_share"
"""Metrics over the training steps, where something samples the GPUs; shares between 0 and 1."""


def measure(
    folder: RunFolder, training: Mapping[str, Any], points: Sequence[tuple[int, Mapping[str, float]]]
) -> Measurements:
    """Read a run's folder.

    Args:
        training: what the training job left as its result.
        points: ``(step, metrics)`` of the training run.
    """
    # What it takes to ask the champion as well is not the run's own.
    spans = {stage: _spans(folder.job(stage)) for stage in STAGES}
    stages = tuple(_stage(stage, folder, spans[stage]) for stage in STAGES)
    every = [span for found in spans.values() for span in found]
    original, finetuned = (
        ModelSpeed.from_manifest(read_json(folder.inference(which) / "manifest.json"))
        for which in ("baseline", "finetuned")
    )
    adapter = folder.adapter
    return Measurements(
        stages=stages,
        wall_hours=(max(end for _, end, _ in every) - min(start for start, _, _ in every)) / 3600 if every else None,
        gpu_hours=_hours(stages, only_gpus=True),
        process_hours=_hours(stages, only_gpus=False),
        storage_gbytes=_bytes(folder.root) / 1e9,
        final_loss=training.get("final_loss"),
        tokens_per_s_per_gpu=training.get("tokens_per_s_per_gpu"),
        gpu_utilization=_mean([m[GPU_UTILIZATION] for _, m in points if GPU_UTILIZATION in m]),
        gpu_memory_share=max((m[GPU_MEMORY] for _, m in points if GPU_MEMORY in m), default=None),
        has_final_checkpoint=(adapter / "manifest.json").exists() and any(adapter.glob("*.safetensors")),
        num_out_of_memory=sum(
            _ran_out_of_memory(s) for stage in STAGES for s in folder.job(stage).glob("*/summary.json")
        )
        + (original.num_memory_retries or 0)
        + (finetuned.num_memory_retries or 0),
        original=original,
        finetuned=finetuned,
    )


Span = tuple[float, float, Mapping[str, Any]]
"""Start and end of an attempt in unix seconds, and its job."""


def _spans(job: Path) -> list[Span]:
    found: list[Span] = []
    for attempt in sorted(path.parent for path in job.glob("*/spec.json")):
        spec = read_json(attempt / "spec.json")
        begun, result, summary = (attempt / name for name in ("begun.json", "result.json", "summary.json"))
        start = read_json(begun)["time"] if begun.exists() else None
        starts = attempt / STARTS
        if starts.exists():
            # From the first of a requeued job's lives on: what was lost was paid for, and the wait between counts with it.
            start = float(starts.read_text().split()[0])
        if result.exists():
            end = read_json(result)["finished"]
        elif summary.exists():
            end = read_json(summary)["states"][-1]["time"]
        else:
            # Nobody saw it end: until its last sign of life.
            end = max(path.stat().st_mtime for path in attempt.iterdir())
        if start is not None:
            found.append((start, end, spec))
    return found


def _stage(name: str, folder: RunFolder, spans: Sequence[Span]) -> StageTime:
    attempts = sorted(path.parent for path in folder.job(name).glob("*/spec.json"))
    spec = read_json(attempts[-1] / "spec.json") if attempts else {}
    return StageTime(
        name=name,
        seconds=sum(end - start for start, end, _ in spans),
        num_processes=spec.get("num_nodes", 1) * spec.get("processes_per_node", 1),
        uses_gpus=bool(spec.get("gpus", False)),
        num_attempts=len(attempts),
        succeeded=not attempts or (attempts[-1] / "result.json").exists(),
    )


def _hours(stages: Sequence[StageTime], *, only_gpus: bool) -> float | None:
    counted = [stage for stage in stages if stage.uses_gpus or not only_gpus]
    return sum(stage.seconds * stage.num_processes for stage in counted) / 3600 if counted else None


def _ran_out_of_memory(summary: Path) -> bool:
    return says_out_of_memory(str(read_json(summary)["error"] or ""))


def _bytes(folder: Path) -> int:
    """Of the files below a folder; links to what runs share are not followed."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
