"""What runs on shared storage do and cluster checks found, as a file for Prometheus' node exporter (its textfile collector).

    python -m infra.monitoring.textfile --storage /shared/storage --out /var/lib/node_exporter/proving_ground.prom

Once a minute from cron or a systemd timer, on a machine that sees the shared folder. It reads what jobs have written and asks no
scheduler and no server. The file is written whole and renamed; where that fails, its age is what the alert goes by.
"""

import argparse
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.contracts.attempt import read_points
from tasks.contracts.cluster_report import Status
from tasks.contracts.files import read_json, write_text
from tasks.contracts.run_folder import CheckFolder
from tasks.contracts.settings import StorageSettings
from tasks.pool.attempts import log_paths, outcome_of, read_spec
from tasks.pool.on_disk import JobOnDisk, all_checks, all_runs, jobs_of_run

NEWEST_RUNS = NEWEST_CHECKS = 50
"""Older ones have ended, and their figures are in MLflow."""
PREFIX = "proving_ground_"
HELP = {
    "training_tokens_per_s_per_gpu": "Newest point of the training throughput, padding not counted.",
    "training_loss": "Newest point of the training loss.",
    "training_step": "Newest optimiser step with a point.",
    "training_point_timestamp_seconds": "When the newest point was written.",
    "job_waiting_seconds": "For how long the newest attempt has been submitted without a line from any rank; 0: it runs or ran.",
    "job_ended": "1: the newest attempt ended so.",
    "cluster_check_status": "Whether the cluster's newest check that gave a verdict gave this one.",
    "cluster_check_finished_seconds": "When that check ended, unix time.",
    "cluster_check_gates": "Its gates by verdict.",
    "cluster_check_figure": "Its figures, each in the unit that its name ends with.",
    "written_timestamp_seconds": "When this file was written.",
}
Sample = tuple[str, dict[str, str], float]
LABEL = re.compile(r'(\w+)="((?:[^"\\\n]|\\.)*)"(?:,|$)')
SAMPLE = re.compile(rf"{PREFIX}(\w+)\{{(.+)\}} (\S+)")


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
    """What each cluster's newest check with a verdict wrote.

    One that gave way to training looked at nothing, and one that did a fault to itself says nothing of the cluster. Where the
    newest cannot be read, an older one's figures would be taken for its own: then there are none.
    """
    told: set[str] = set()
    for name in reversed(all_checks(storage)[-NEWEST_CHECKS:]):
        folder = CheckFolder(StorageSettings(shared=str(storage)), name)
        if not folder.verdict.exists():
            continue
        try:
            check = read_json(folder.check)["check"]
            cluster = check["cluster"]
            if cluster in told or check["inject"] is not None:
                continue
            told.add(cluster)
            report = read_json(folder.verdict)
            if report["status"] == Status.SKIP:
                told.remove(cluster)
                continue
            yield from _whole(folder.report / "cluster-check.prom", report["figures"])
        except (OSError, ValueError, KeyError) as error:
            # Cron mails it; the other figures are told all the same.
            print(f"check {name} cannot be read: {error!r}", file=sys.stderr)


def _whole(path: Path, figures: list[dict[str, Any]]) -> list[Sample]:
    """The samples of a check's file.

    Args:
        figures: those of the verdict, which is written last; several processes of a node may tell the same one.

    Raises:
        OSError: there is no such file.
        ValueError: a part of it is missing, or is nothing that is told here.
    """
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        raise ValueError(f"{path} is not whole: it ends in the middle of a line")
    found = [_sample(line) for line in text.splitlines() if not line.startswith("#")]
    series = {(f["stage"], f["place"], *(f["figure"][key] for key in ("name", "size_bytes", "peer"))) for f in figures}
    expected = {"status": len(Status), "finished_seconds": 1, "gates": len(Status), "figure": len(series)}
    for name, number in expected.items():
        there = sum(metric == f"cluster_check_{name}" for metric, _, _ in found)
        if there != number:
            raise ValueError(f"{path} is not whole: {there} of {number} series of {name}")
    return found


def _sample(line: str) -> Sample:
    match = SAMPLE.fullmatch(line)
    labels = LABEL.findall(match[2]) if match else []
    if match is None or match[1] not in HELP or LABEL.sub("", match[2]):
        raise ValueError(f"{line!r} is no sample of {', '.join(HELP)}")
    return match[1], {key: _plain(text) for key, text in labels}, float(match[3])


def render(found: list[Sample]) -> str:
    """The text format of Prometheus; every metric is a gauge."""
    lines = []
    for name, meaning in HELP.items():
        full = f"{PREFIX}{name}"
        lines += [f"# HELP {full} {meaning}", f"# TYPE {full} gauge"]
        for metric, labels, value in found:
            if metric == name:
                inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
                lines.append(f"{full}{{{inside}}} {value!r}" if inside else f"{full} {value!r}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _plain(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], text)


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
