"""What the runs on shared storage are doing, as a file for Prometheus' node exporter (its textfile collector).

    python -m infra.monitoring.textfile --storage /shared/storage --out /var/lib/node_exporter/proving_ground.prom

Once a minute from cron or a systemd timer, on a machine that sees the shared folder. It reads what jobs have written and asks no
scheduler and no server. The file is written whole and renamed; where that fails, its age is what the alert goes by.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from tasks.contracts.attempt import read_points
from tasks.contracts.files import write_text
from tasks.pool.attempts import log_paths, outcome_of, read_spec
from tasks.pool.on_disk import JobOnDisk, all_runs, jobs_of_run

NEWEST_RUNS = 50
"""Older ones have ended, and their figures are in MLflow."""
HELP = {
    "training_tokens_per_s_per_gpu": "Newest point of the training throughput, padding not counted.",
    "training_loss": "Newest point of the training loss.",
    "training_step": "Newest optimiser step with a point.",
    "training_point_timestamp_seconds": "When the newest point was written.",
    "job_waiting_seconds": "For how long the newest attempt has been submitted without a line from any rank; 0: it runs or ran.",
    "job_ended": "1: the newest attempt ended so.",
    "written_timestamp_seconds": "When this file was written.",
}
Sample = tuple[str, dict[str, str], float]


def samples(storage: Path, now: float) -> Iterator[Sample]:
    """``(metric, labels, value)`` of the newest runs."""
    for run in all_runs(storage)[-NEWEST_RUNS:]:
        for job in jobs_of_run(storage, run):
            yield from _of_job(job, now)
    yield "written_timestamp_seconds", {}, now


def _of_job(job: JobOnDisk, now: float) -> Iterator[Sample]:
    labels = {"run": job.run, "stage": job.stage}
    ended = outcome_of(job.path).get("state")
    if ended is not None:
        yield "job_ended", labels | {"state": str(ended)}, 1
    has_begun = ended is not None or any(path.exists() for path in log_paths(read_spec(job.path), job.path))
    yield "job_waiting_seconds", labels, 0.0 if has_begun else now - (job.path / "spec.json").stat().st_mtime
    points = read_points(job.path.parent)
    if job.stage == "train_adapter" and points:
        step, metrics = points[-1]
        yield "training_step", {"run": job.run}, step
        for metric, name in (
            ("training_loss", "train/loss"),
            ("training_tokens_per_s_per_gpu", "train/tokens_per_s_per_gpu"),
        ):
            if name in metrics:
                yield metric, {"run": job.run}, metrics[name]
        written = max(file.stat().st_mtime for file in job.path.parent.glob("*/metrics.jsonl"))
        yield "training_point_timestamp_seconds", {"run": job.run}, written


def render(found: list[Sample]) -> str:
    """The text format of Prometheus; every metric is a gauge."""
    lines = []
    for name, meaning in HELP.items():
        full = f"proving_ground_{name}"
        lines += [f"# HELP {full} {meaning}", f"# TYPE {full} gauge"]
        for metric, labels, value in found:
            if metric == name:
                inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
                lines.append(f"{full}{{{inside}}} {value!r}" if inside else f"{full} {value!r}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m infra.monitoring.textfile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--storage", type=Path, default=Path("storage"), help="the runs' shared folder (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, help="file of the textfile collector, ending in .prom")
    arguments = parser.parse_args()
    write_text(arguments.out, render(list(samples(arguments.storage.resolve(), time.time()))))


if __name__ == "__main__":
    main()
