"""Does each fault to a cluster check and counts how often it is caught with the right culprit: ``make faults-cluster REPEAT=20``.

    python -m tests.faults.cluster --repeat 5 --only sleep hang      some of them
    python -m tests.faults.cluster --repeat 20 --only clean          false alarms

Every run is the whole flow, with its own folder, MLflow run and report, on two emulated nodes; a fault's run leaves out
the stages that it does not touch. Exit status 1 if one was missed, or a clean run failed.
"""

import argparse
import logging
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.cluster_check import cluster_check, settings_of
from flows.local_stack import end_as_with_ctrl_c, temporary_stack
from tasks.contracts.cluster_report import Report, Status
from tasks.contracts.deployments import deployment_values
from tasks.contracts.files import read_json
from tasks.contracts.run_folder import CheckFolder

FAULTS = {
    "sleep": ["inventory", "devices", "collectives"],
    "half_threads": ["inventory"],
    "corrupt": ["inventory", "collectives"],
    "wrong_version": ["inventory"],
    "read_only": ["inventory", "storage"],
    "full_disk": ["inventory", "storage"],
    "dead": ["inventory", "collectives"],
    "hang": ["inventory", "collectives"],
    "nan": ["inventory", "devices"],
}
"""Each with the stages that run."""
CLEAN = ["inventory", "devices", "collectives", "storage"]
WHOLE_NODE = ("wrong_version", "read_only", "full_disk")
"""Faults whose culprit is the node and not one of its processes."""
SMALL = [
    "devices.matrix_size=512", "devices.warmup_s=0.2", "devices.num_repeats=8", "devices.copy_mbytes=32",
    "devices.max_pattern_mbytes=64", "collectives.max_mib=1", "collectives.num_repeats=8", "collectives.pair_mib=1",
    "storage_probe.file_mbytes=16", "storage_probe.num_small_files=10", "stall_limit_s=10",
]  # fmt: skip


def check_once(storage: Path, name: str, kind: str, node: int) -> tuple[Report, float]:
    """One run of the flow, with its report and seconds."""
    overrides = [*SMALL, f"storage.shared={storage}", f"stages={FAULTS.get(kind, CLEAN)}"]
    if kind != "clean":
        overrides.append(f"inject={{kind: {kind}, node: {node}}}")
    check = settings_of(deployment_values("demo", "cluster-check", "check"), overrides)
    began = time.monotonic()
    cluster_check(check=check, run=name, return_state=True)
    report = Report.model_validate(read_json(CheckFolder(check.storage, name).report / "cluster-check.json"))
    return report, time.monotonic() - began


def problem_of(report: Report, kind: str, node: int) -> str:
    """What is not as it should be; empty: nothing."""
    if kind == "clean":
        bad = [f"{f.stage}/{f.gate}: {f.detail}" for f in report.findings if f.status in (Status.FAIL, Status.ERROR)]
        return "; ".join(bad)
    expected = f"node{node}" if kind in WHOLE_NODE else f"node{node}/process0"
    if report.status is not Status.FAIL:
        return f"not caught: {report.statement}"
    first = report.suspects[0].place if report.suspects else "nobody"
    return "" if first == expected else f"blames {first} instead of {expected}: {report.statement}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=1, help="times each is done (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="chooses the node (default: %(default)s)")
    parser.add_argument("--only", choices=[*FAULTS, "clean"], nargs="*")
    options = parser.parse_args()
    kinds = options.only or [*FAULTS, "clean"]
    counts = dict.fromkeys(kinds, 0)
    done = dict.fromkeys(kinds, 0)
    end_as_with_ctrl_c()
    for name in ("prefect", "prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder, temporary_stack(Path(folder)) as addresses:
        os.environ |= addresses.environment()
        with temporary_settings({PREFECT_API_URL: addresses.prefect_api}):
            for number in range(options.repeat):
                for kind in kinds:
                    node = random.Random(f"{options.seed}/{kind}/{number}").randrange(2)
                    report, seconds = check_once(Path(folder), f"{kind.replace('_', '-')}-{number}", kind, node)
                    problem = problem_of(report, kind, node)
                    counts[kind] += not problem
                    done[kind] += 1
                    where = "" if kind == "clean" else f" on node {node}"
                    print(f"{kind}{where}: {problem or 'as it should'}, {seconds:.0f} s", flush=True)
    print()
    for kind in kinds:
        told = "no FAIL" if kind == "clean" else "caught, culprit named"
        print(f"{counts[kind]:>3} of {done[kind]}  {kind.replace('_', ' ')}: {told}")
    return 0 if counts == done else 1


if __name__ == "__main__":
    sys.exit(main())
