"""Does each fault to training N times and counts how often it ends as the unbroken run: ``make faults REPEAT=20``.

Toy runs of 60 steps on two emulated nodes, started by the local pool as real jobs are; whatever ends an attempt, the same
job is submitted again. A run counts when its loss curve, learning rates and rows are the unbroken run's, to TOLERANCE.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tasks.contracts.attempt import read_progress
from tasks.contracts.files import read_json
from tasks.contracts.job import JobFailed, JobSpec
from tasks.pool.local import LocalPool
from tasks.pool.supervise import Watch, supervise
from tasks.training.checkpoints import newest_valid, steps_of, validate
from tasks.training.ledger import committed, prove
from tests.conftest import REPOSITORY
from tests.processes import processes_under
from tests.training import toy
from tests.training.toy_ranks import ToyJob

TOLERANCE_NATS = 1e-4
NUM_STEPS = 60
MAX_ATTEMPTS = 6
FILES_DAMAGED_PER_REPEAT = 20


class Run:
    """One training job of the local pool, submitted until it is done."""

    def __init__(self, home: Path, name: str) -> None:
        self.root = home / name
        self.arguments = toy.arguments(self.root, home / "model", home / "dataset", num_epochs=5, keep_checkpoints=3)
        self.pool = LocalPool(home / "pool")
        self.folder = self.root / "job"
        self.exit_codes: list[int] = []
        self.largest_difference = 0.0

    def attempt(self, num_nodes: int, disturb: Callable[[Path], None] | None = None) -> bool:
        """One attempt; whether it ended well. ``disturb`` is called with its folder until it has ended."""
        job = JobSpec(
            name=self.root.name,
            module="tasks.training",
            arguments=self.arguments,
            folder=str(self.folder),
            num_nodes=num_nodes,
            env={"PYTHONPATH": str(REPOSITORY)},
            time_limit_s=600,
        )
        handles: list[str] = []

        def look() -> bool:
            if disturb is not None and handles:
                disturb(Path(handles[0]))
            return False

        try:
            supervise(self.pool, job, Watch(on_submit=handles.append, should_stop=look))
        except JobFailed:
            for path in Path(handles[0]).glob("node-*.failures.json"):
                self.exit_codes += [failure["exit_code"] for failure in read_json(path)]
            return False
        return True

    def finish(self, num_nodes: int = 2) -> None:
        for _ in range(MAX_ATTEMPTS):
            if self.attempt(num_nodes):
                return
        raise AssertionError(f"{self.root.name} did not finish in {MAX_ATTEMPTS} attempts")

    def differences(self, unbroken: "Run") -> list[str]:
        """How this run is not the unbroken one; ``unbroken`` keeps the largest difference that was seen."""
        ours, theirs = toy.points(self.folder), toy.points(unbroken.folder)
        problems = [] if list(ours) == list(theirs) else [f"{len(ours)} points instead of {len(theirs)}"]
        for step, point in theirs.items():
            for name in ("train/loss", "train/learning_rate"):
                apart = abs(ours.get(step, {}).get(name, float("inf")) - point[name])
                unbroken.largest_difference = max(unbroken.largest_difference, apart)
                if apart > TOLERANCE_NATS:
                    problems.append(f"step {step}: {name} differs by {apart:.2g}")
        if committed(self.root / "training" / "ledger")[1] != committed(unbroken.root / "training" / "ledger")[1]:
            problems.append("other rows were used")
        if prove(self.root / "training" / "ledger").num_steps != NUM_STEPS:
            problems.append("the ledger proves fewer steps")
        return problems


def strike(draw: random.Random, number: int) -> Callable[[Path], None]:
    """Send a signal to a random rank once a random step has been reached."""
    step = draw.randint(2, NUM_STEPS - 8)
    struck: list[int] = []

    def disturb(attempt: Path) -> None:
        progress = read_progress(attempt)
        # Steps count over all attempts.
        if struck or progress is None or progress.done < min(step, progress.total - 8):
            return
        ranks = [process for process in processes_under(attempt) if is_rank(process)]
        if ranks:
            victim = draw.choice(sorted(ranks, key=lambda process: process.pid))
            victim.send_signal(number)
            struck.append(victim.pid)

    return disturb


def is_rank(process: psutil.Process) -> bool:
    try:
        return "RANK" in process.environ() and "tasks.pool.torchrun_agent" not in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def killed(home: Path, unbroken: Run, draw: random.Random, name: str) -> list[str]:
    """kill -9 of a random rank at a random step."""
    run = Run(home, name)
    if run.attempt(2, strike(draw, signal.SIGKILL)):
        return ["the fault came too late"]
    run.finish()
    return run.differences(unbroken)


def told_to_go(home: Path, unbroken: Run, draw: random.Random, name: str) -> list[str]:
    """SIGTERM or SIGUSR1 to a random rank at a random step; all leave with 75."""
    run = Run(home, name)
    if run.attempt(2, strike(draw, draw.choice([signal.SIGTERM, signal.SIGUSR1]))):
        return ["the fault came too late"]
    codes = sorted(run.exit_codes)
    run.finish()
    # A node that takes longer than the pool's grace to write its exit down has none here.
    return ([] if set(codes) == {75} else [f"exit codes {codes}"]) + run.differences(unbroken)


def two_one_two(home: Path, unbroken: Run, draw: random.Random, name: str) -> list[str]:
    """Two ranks, one, two again, each change at a random step."""
    run = Run(home, name)
    for num_nodes in (2, 1):
        if run.attempt(num_nodes, strike(draw, signal.SIGTERM)):
            return ["the fault came too late"]
    run.finish()
    widths = [start.world_size for start in committed(run.root / "training" / "ledger")[0]]
    return ([] if widths == [2, 1, 2] else [f"world sizes {widths}"]) + run.differences(unbroken)


def damaged(home: Path, unbroken: Run, draw: random.Random, name: str) -> list[str]:
    """A bit flipped or the end cut off, in a random file of the newest checkpoint; the one before must be used."""
    checkpoints = home / name
    shutil.copytree(unbroken.root / "training" / "checkpoints", checkpoints)
    newest, before = steps_of(checkpoints)[:2]
    folder = checkpoints / f"step-{newest:06d}"
    binding = validate(folder)["experiment"]
    problems = []
    for _ in range(FILES_DAMAGED_PER_REPEAT):
        path = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        whole = path.read_bytes()
        at = draw.randrange(len(whole))
        flipped = whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :]
        path.write_bytes(draw.choice([flipped, whole[:at]]))
        found = newest_valid(checkpoints, binding, say=lambda line: None)
        if found is None or found[0] != before:
            problems.append(f"{path.name}, byte {at} of {len(whole)}: {found and found[0]} was taken")
        path.write_bytes(whole)
    return problems


def toy_job(home: Path, name: str) -> ToyJob:
    arguments = toy.arguments(home / name, home / "model", home / "dataset", num_epochs=5, keep_checkpoints=3)
    return ToyJob(home / name, arguments)


def outlived(home: Path, unbroken: Run, draw: random.Random, name: str) -> list[str]:
    """An attempt that goes on training when its successor has begun; it must not write."""
    job = toy_job(home, name)
    stale = job.start(1, pause_s=0.02)
    stale.wait_for_step(draw.randint(5, 20))
    job.run(2)
    problems = [] if stale.wait() == [1] and "StaleAttempt" in stale.error(0) else ["the old attempt was not refused"]
    if (stale.folder / "result.json").exists():
        problems.append("the old attempt left a result")
    run = Run(home, name)
    return problems + run.differences(unbroken)


def full_disk(home: Path, unbroken: Run, draw: random.Random, name: str) -> list[str]:
    """No room for any checkpoint; training goes on and its result says so."""
    job = toy_job(home, name)
    failed = job.run(2, free_bytes=draw.randrange(1 << 20))["failed_checkpoints"]
    run = Run(home, name)
    return ([] if len(failed) == NUM_STEPS // 5 else [f"{len(failed)} failures were told"]) + run.differences(unbroken)


FAULTS = [killed, told_to_go, two_one_two, damaged, outlived, full_disk]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=[fault.__name__ for fault in FAULTS], nargs="*")
    options = parser.parse_args()
    counts: dict[str, int] = {}
    largest: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        toy.make_model(home / "model")
        toy.make_rows(home / "dataset")
        unbroken = Run(home, "unbroken")
        unbroken.finish()
        for fault in FAULTS:
            if options.only and fault.__name__ not in options.only:
                continue
            draw, counts[fault.__name__] = random.Random(f"{options.seed}/{fault.__name__}"), 0
            unbroken.largest_difference = 0.0
            for number in range(options.repeat):
                began = time.monotonic()
                name = f"{fault.__name__.replace('_', '-')}-{number}"
                problems = fault(home, unbroken, draw, name)
                counts[fault.__name__] += not problems
                seconds = time.monotonic() - began
                print(f"{name}: {'; '.join(problems[:3]) or 'as it should'}, {seconds:.0f} s", flush=True)
                shutil.rmtree(home / name)
            largest[fault.__name__] = unbroken.largest_difference
    for fault in FAULTS:
        if fault.__name__ in counts:
            name, apart = fault.__name__, largest[fault.__name__]
            print(f"{counts[name]:3} of {options.repeat}  {fault.__doc__} Largest difference of a loss: {apart:.1e}")
    return 0 if all(count == options.repeat for count in counts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
