"""A job small enough for tests: ``torchrun -m tests.pool.toy_job spec.json``. It does what its arguments say."""

import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch.distributed

from tasks.contracts.attempt import Attempt, run_rank
from tasks.contracts.job import LEFT_EXIT_CODE


def main(attempt: Attempt) -> Mapping[str, Any] | None:
    arguments = attempt.arguments
    rank = int(os.environ["RANK"])
    told: list[int] = []
    if arguments.get("leaves"):
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: told.append(number))
    on_gpu = bool(os.environ.get("CUDA_VISIBLE_DEVICES"))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    total = torch.tensor([rank + 1], device=device)
    torch.distributed.all_reduce(total)
    print(f"rank {rank} sees the sum {total.item()}")
    if on_gpu:
        print(
            f"rank {rank} has {torch.cuda.get_device_properties(device).uuid} of {os.environ['CUDA_VISIBLE_DEVICES']}"
        )
    attempt.report_progress(1, 2, "sums")
    if rank == 0:
        attempt.log_metrics(1, {"sum": float(total)})
    if arguments.get("fail_rank") == rank:
        raise ValueError(f"rank {rank} has a bad value: 42")
    # In every attempt, or in those before the one of this number.
    if arguments.get("hang") is True or int(attempt.folder.name) < arguments.get("hang", 0):
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and not told:
            time.sleep(0.05)
    if told:
        print(f"rank {rank} leaves at signal {told[0]}")
        sys.exit(LEFT_EXIT_CODE)
    time.sleep(arguments.get("pause_s", 0))
    # Rank 0 waits for the others here, and loses its peer when one fails.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return {"sum": total.item()} if rank == 0 else None


if __name__ == "__main__":
    run_rank(main, sys.argv)
