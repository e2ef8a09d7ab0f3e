"""What runs on shared storage do and cluster checks found, as a file for Prometheus' node exporter (its textfile collector).

    python -m infra.monitoring.textfile --storage /shared/storage --out /var/lib/node_exporter/proving_ground.prom

Once a minute from cron or a systemd timer, on a machine that sees the shared folder. It reads what jobs have written and asks no
scheduler and no server. The file is written whole and renamed; where that fails, its age is what the alert goes by.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tasks.cluster.report import MEANINGS, samples_of
from tasks.contracts.attempt import read_points
from tasks.contracts.cluster_report import Report, Status
from tasks.contracts.files import read_json, write_text
from tasks.contracts.prometheus_text import Sample, render
from tasks.contracts.run_folder import CheckFolder
from tasks.contracts.settings import StorageSettings
from tasks.pool.attempts import log_paths, outcome_of, read_spec
from tasks.pool.on_disk import JobOnDisk, all_checks, all_runs, jobs_of_run

NEWEST_RUNS = NEWEST_CHECKS = 50
"""Older ones have ended, and their figures are in MLflow."""
HELP = {
    "training_tokens_per_s_per_gpu": "Newest point of the training throughput, padding not counted.",
    "training_loss": "Newest point of the training loss.",
    "training_step": "Newest optimiser step with a point.",
    "training_point_timestamp_seconds": "When the newest point was written.",
    "job_waiting_seconds": "For how long the newest attempt has been submitted without a line from any rank; 0: it runs or ran.",
    "job_ended": "1: the newest attempt ended so.",
    **MEANINGS,
    "written_timestamp_seconds": "When this file was written.",
}


def samples(storage: Path, now: float) -> Iterator[Sample]:
    """``(metric, labels, value)`` of the newest runs, and of each cluster's newest check."""
    for run in all_runs(storage)[-NEWEST_RUNS:]:
        for job in jobs_of_run(storage, run):
            yield from _of_job(job, now)
    yield from _of_checks(storage)
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


def _of_checks(storage: Path) -> Iterator[Sample]:
    """What each cluster's newest check with a verdict found.

    One that gave way to training looked at nothing, and one that did a fault to itself says nothing of the cluster. Where the
    newest cannot be read nobody knows whose it is, and an older one's figures might be taken for its own: then there are none.
    """
    told: set[str] = set()
    for name in reversed(all_checks(storage)[-NEWEST_CHECKS:]):
        verdict = CheckFolder(StorageSettings(shared=str(storage)), name).verdict
        if not verdict.exists():
            continue
        try:
            report = Report.model_validate(read_json(verdict))
        except (OSError, ValueError) as error:
            # Cron mails it; the runs' figures are told all the same.
            print(f"{verdict} cannot be read, so nothing is told of it and of older checks: {error}", file=sys.stderr)
            return
        if report.cluster not in told and report.status is not Status.SKIP and report.injected is None:
            told.add(report.cluster)
            yield from samples_of(report)


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
    write_text(arguments.out, render(list(samples(arguments.storage.resolve(), time.time())), HELP))


if __name__ == "__main__":
    main()
