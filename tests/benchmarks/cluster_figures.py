"""The cluster check's figures against plain loops on the same machine: ``python -m tests.benchmarks.cluster_figures REPORT``.

REPORT is the cluster-check.json of a check that ran on this machine just before, on one node with all its GPUs. Each loop is
what one would write by hand: warm-up, calls one right behind the other between two events, bytes or operations over time.
Small messages are over before Python has launched the next, so that all-reduces are looped over twice: launched while the GPU
is busy, and as they come. Table last: plain loop, check, ratio.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from tests.conftest import REPOSITORY

MIB = 1 << 20
HEAT_S = 5.0
AS_THEY_COME = "all_reduce_busbw_gbytes_per_s, launched as they come"


def seconds_of(work: Callable[[], object], calls: int, busy_cycles: int = 0) -> float:
    """Of one call, after a few to warm up, launched while the GPU is busy for so many cycles."""
    for _ in range(3):
        work()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if busy_cycles:
        torch.cuda._sleep(busy_cycles)
    start.record()
    for _ in range(calls):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def plain_loops(sizes: list[int]) -> dict[str, float]:
    """Every figure of the slowest rank, on rank 0."""
    rank, device = int(os.environ["RANK"]), torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    count = dist.get_world_size()
    figures = {}
    left, right = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds_of(lambda: left @ right, int(HEAT_S / seconds_of(lambda: left @ right, 10)))
    figures["matrix_product_bfloat16_tflops_per_s"] = 2 * 8192**3 / seconds_of(lambda: left @ right, 200) / 1e12
    source = torch.ones(250_000_000, device=device)
    target = torch.zeros_like(source)
    figures["memory_copy_gbytes_per_s"] = 2e9 / seconds_of(lambda: target.copy_(source), 50) / 1e9
    host = torch.ones(250_000_000, pin_memory=True)
    figures["host_to_device_gbytes_per_s"] = 1e9 / seconds_of(lambda: target.copy_(host, non_blocking=True), 20) / 1e9
    for size in sizes:
        buffer = torch.zeros(size // 4, device=device)
        bus_gbytes, calls = size / 1e9 * 2 * (count - 1) / count, max(10, min(200, (8 << 30) // size))
        reduce = lambda buffer=buffer: dist.all_reduce(buffer)  # noqa: E731
        figures[f"all_reduce_busbw_gbytes_per_s@{size}"] = bus_gbytes / seconds_of(reduce, calls, 20_000_000)
        figures[f"{AS_THEY_COME}@{size}"] = bus_gbytes / seconds_of(reduce, calls)
    slowest = torch.tensor(list(figures.values()), device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MIN)
    dist.destroy_process_group()
    return dict(zip(figures, slowest.tolist(), strict=True)) if rank == 0 else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--loops", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loops:
        if figures := plain_loops(json.loads(arguments.loops)):
            print(json.dumps(figures))
        return
    checked: dict[str, float] = {}
    for placed in json.loads(arguments.report.read_text())["figures"]:
        figure = placed["figure"]
        size = figure.get("size_bytes")
        name = figure["name"] + (f"@{size}" if size is not None else "")
        checked[name] = min(figure["value"], checked.get(name, figure["value"]))
    sizes = sorted(int(name.split("@")[1]) for name in checked if name.startswith("all_reduce_busbw"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={torch.cuda.device_count()}", "--module", "tests.benchmarks.cluster_figures"]
    loops = ["--loops", json.dumps([size for size in sizes if size >= MIB])]
    done = subprocess.run(
        [*command, str(arguments.report), *loops], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True
    )
    print(f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}, torch {torch.__version__}")
    print(f"{'':64}    plain    check  ratio")
    for name, plain in json.loads(done.stdout.splitlines()[-1]).items():
        figure = checked.get(name.replace(AS_THEY_COME, AS_THEY_COME.partition(",")[0]))
        beside = "  not in the report" if figure is None else f" {figure:8.1f} {figure / plain:6.3f}"
        print(f"{name:64} {plain:8.1f}{beside}")


if __name__ == "__main__":
    main()
