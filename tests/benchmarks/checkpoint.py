"""What a checkpoint costs: ``python -m tests.benchmarks.checkpoint [FOLDER] [MILLION_PARAMETERS]``.

Random float32 tensors as a LoRA adapter of that size has with AdamW's two moments (Llama 3.1 8B, rank 64: 168 million).
Copying off holds training up; writing, hashing and fsync do not, and the longest pause that they cause a thread of Python
is measured too.
"""

import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from tasks.training.checkpoints import Snapshot, validate, write_checkpoint
from tasks.training.copy_off import CopyOff

NUM_TENSORS = 448


def main(folder: Path, million_parameters: int) -> None:
    torch.set_num_threads(1)
    size = million_parameters * 1_000_000 // NUM_TENSORS
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = [
        {f"{kind}/{i}": torch.randn(size, device=device) for i in range(NUM_TENSORS)} for kind in ("adapter", "m", "v")
    ]
    copy_off, copied = CopyOff(), list[float]()
    for _ in range(3):
        began = time.perf_counter()
        copies = copy_off({name: tensor for part in parts for name, tensor in part.items()})
        copied.append(time.perf_counter() - began)
    adapter, first, second = [{name: copies[name] for name in part} for part in parts]
    snapshot = Snapshot(1, adapter, first | second, {"state.json": "{}"}, None)
    with tempfile.TemporaryDirectory(dir=folder) as checkpoints:
        seconds: list[float] = []

        def write() -> None:
            start = time.perf_counter()
            write_checkpoint(Path(checkpoints), snapshot, binding={}, world_size=1, before_commit=lambda: None)
            seconds.append(time.perf_counter() - start)

        thread = threading.Thread(target=write)
        thread.start()
        longest, last = 0.0, time.perf_counter()
        while thread.is_alive():
            time.sleep(0.001)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        began = time.perf_counter()
        validate(Path(checkpoints) / "step-000001")
        checked = time.perf_counter() - began
    print(
        f"{snapshot.num_bytes / 1e9:.2f} GB: copied off from {device} in {copied[0]:.2f} s, later {copied[-1]:.2f} s (training "
        f"waits), written in {seconds[0]:.1f} s (beside training, whose thread once waited {longest * 1000:.0f} ms), checked at "
        f"a start in {checked:.1f} s"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), int(sys.argv[2]) if len(sys.argv) > 2 else 168)
