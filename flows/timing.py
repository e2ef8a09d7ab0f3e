"""Where a run's time went: each stage's own work, and all the rest, which is orchestration."""

import sys
import time

from tasks.contracts.files import read_json
from tasks.contracts.run_folder import RunFolder


def print_timing(folder: RunFolder, started: float) -> None:
    """Print seconds per stage. A stage's own work is its program's, from the first line to the result."""
    spans: list[tuple[str, float, float]] = []
    for stage in folder.stages:
        attempts = sorted(folder.job(stage).glob("*/result.json"))
        if attempts:
            result = read_json(attempts[-1])
            if result["started"] >= started:
                spans.append((stage, result["started"], result["finished"]))
    total = time.time() - started
    working = _covered([(start, end) for _, start, end in spans])
    print(f"\n{'stage':<28}{'seconds':>9}{'share':>8}")
    for stage in folder.stages:
        span = next(((start, end) for name, start, end in spans if name == stage), None)
        text = f"{span[1] - span[0]:>9.1f}{(span[1] - span[0]) / total:>8.0%}" if span else f"{'not run':>9}"
        print(f"{stage:<28}{text}")
    print(f"{'orchestration':<28}{total - working:>9.1f}{(total - working) / total:>8.0%}")
    print(f"{'total':<28}{total:>9.1f}", flush=True)
    sys.stdout.flush()


def _covered(spans: list[tuple[float, float]]) -> float:
    """Seconds covered by at least one span: stages that run side by side count once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
