"""Does each fault to a cluster check and counts how often it is caught with the right culprit: ``make faults-cluster REPEAT=20``.

    python -m tests.faults.cluster --repeat 5 --only sleep hang      some of them
    python -m tests.faults.cluster --repeat 20 --only clean          false alarms

Every run is the whole flow, with its own folder, MLflow run and report, on two emulated nodes, with probes smaller than the
demo's. A fault's run leaves out the stages that it does not touch; a clean one has all of the demo's, training as well. A fault
counts as caught when the verdict is FAIL, the first suspect is who did it, and a gate that is there for this fault says so. A
clean run counts when every stage ran to its end and nothing is FAIL or ERROR. What leaves no report, or a process behind, does
not count. A fault takes about half a minute, a clean run two, on two busy cores six. Exit status 1 if one did not count.
"""

import argparse
import logging
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.cluster_check import cluster_check, settings_of
from flows.local_stack import end_as_with_ctrl_c, temporary_stack
from tasks.contracts.cluster_report import Report, Status
from tasks.contracts.deployments import deployment_values
from tasks.contracts.files import read_json
from tasks.contracts.run_folder import CheckFolder
from tests.processes import processes_under

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
GATES = {
    "sleep": ("collectives/lateness_s", "devices/step_s", "devices/matrix_product_", "devices/memory_copy_"),
    "half_threads": ("inventory/equal_num_threads", "inventory/equal_num_processors"),
    "corrupt": tuple(f"collectives/{name}_correct" for name in (
        "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv", "pair")),
    "wrong_version": ("inventory/equal_torch",),
    "read_only": ("storage/shared_writable", "storage/scratch_writable"),
    "full_disk": ("storage/shared_writable", "storage/scratch_writable"),
    "dead": ("collectives/finished",),
    "hang": ("collectives/finished",),
    "nan": ("devices/matrix_product_", "devices/memory_copy_", "devices/step_s"),
}  # fmt: skip
"""Which gates each fault is for, by how their names begin: the right place for another reason is luck."""
CLEAN = ["inventory", "devices", "collectives", "storage", "training"]
WHOLE_NODE = ("wrong_version", "read_only", "full_disk")
"""Faults whose culprit is the node and not one of its processes."""
SMALL = [
    "devices.matrix_size=512", "devices.warmup_s=0.2", "devices.num_repeats=8", "devices.copy_mbytes=32",
    "devices.max_pattern_mbytes=64", "collectives.max_mib=1", "collectives.num_repeats=8", "collectives.pair_mib=1",
    "storage_probe.file_mbytes=16", "storage_probe.num_small_files=10", "stall_limit_s=10",
]  # fmt: skip


class NoReport(RuntimeError):
    """A check that ended without one."""


def check_once(storage: Path, name: str, kind: str, node: int) -> tuple[Report, float]:
    """One run of the flow, with its report and seconds.

    Raises:
        NoReport: it left none.
        KeyboardInterrupt: it was stopped.
    """
    overrides = [*SMALL, f"storage.shared={storage}", f"stages={FAULTS.get(kind, CLEAN)}"]
    if kind != "clean":
        overrides.append(f"inject={{kind: {kind}, node: {node}}}")
    check = settings_of(deployment_values("demo", "cluster-check", "check"), overrides)
    began = time.monotonic()
    state = cluster_check(check=check, run=name, return_state=True)
    if state.is_cancelled():
        raise KeyboardInterrupt
    path = CheckFolder(check.storage, name).report / "cluster-check.json"
    if not path.exists():
        raise NoReport(f"no report: {state.message}")
    return Report.model_validate(read_json(path)), time.monotonic() - began


def problem_of(report: Report, kind: str, node: int) -> str:
    """What is not as it should be; empty: nothing."""
    if kind == "clean":
        bad = [f"{f.stage}/{f.gate}: {f.detail}" for f in report.findings if f.status in (Status.FAIL, Status.ERROR)]
        bad += [f"{o.stage} {o.state}: {o.error}" for o in report.stages if o.stage in CLEAN and o.state != "done"]
        # A check that gave way has found nothing to be wrong, and nothing to be right.
        return "; ".join(bad) or ("" if report.status in (Status.PASS, Status.WARN) else report.statement)
    expected = f"node{node}" if kind in WHOLE_NODE else f"node{node}/process0"
    if report.status is not Status.FAIL:
        return f"not caught: {report.statement}"
    if not report.suspects or report.suspects[0].place != expected:
        first = report.suspects[0].place if report.suspects else "nobody"
        return f"blames {first} instead of {expected}: {report.statement}"
    gates = report.suspects[0].gates
    if not any(gate.startswith(GATES[kind]) for gate in gates):
        return f"blames {expected} for something else: {', '.join(gates)}"
    return ""


def run_counted(storage: Path, kind: str, number: int, seed: int) -> bool:
    """One run, told in a line; whether it was as it should."""
    node = random.Random(f"{seed}/{kind}/{number}").randrange(2)
    began = time.monotonic()
    try:
        report, _ = check_once(storage, f"{kind.replace('_', '-')}-{number}", kind, node)
        problem = problem_of(report, kind, node)
    except NoReport as error:
        problem = str(error)
    if left := processes_under(storage):
        problem = "; ".join(filter(None, [problem, f"{len(left)} processes left behind"]))
    where = "" if kind == "clean" else f" on node {node}"
    load = os.getloadavg()[0]
    print(f"{kind}{where}: {problem or 'as it should'}, {time.monotonic() - began:.0f} s, load {load:.1f}", flush=True)
    return not problem


def told(counts: Counter[str], done: Counter[str]) -> str:
    """The counts so far, a line a kind."""
    lines = []
    for kind in done:
        what = "as sound as it is" if kind == "clean" else "caught by its gate, culprit named first"
        lines.append(f"{counts[kind]:>3} of {done[kind]}  {kind.replace('_', ' ')}: {what}")
    return "\n".join(lines)


def at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: none of none would be all of them; give 1 or more")
    return number


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=at_least_one, default=1, help="times each is done (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="chooses the node (default: %(default)s)")
    parser.add_argument("--only", choices=[*FAULTS, "clean"], nargs="+", help="these kinds alone (default: all)")
    options = parser.parse_args()
    kinds = options.only or [*FAULTS, "clean"]
    counts: Counter[str] = Counter()
    done: Counter[str] = Counter()
    end_as_with_ctrl_c()
    for name in ("prefect", "prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as folder, temporary_stack(Path(folder)) as addresses:
            os.environ |= addresses.environment()
            with temporary_settings({PREFECT_API_URL: addresses.prefect_api}):
                for number in range(options.repeat):
                    for kind in kinds:
                        is_good = run_counted(Path(folder), kind, number, options.seed)
                        done[kind] += 1
                        counts[kind] += is_good
    finally:
        # Also of what was interrupted: an hour of counting is not for nothing.
        print(f"\n{told(counts, done)}", flush=True)
    return 0 if counts == done else 1


if __name__ == "__main__":
    sys.exit(main())
