"""Where a training step's time goes on the GPU: ``training_gpu --profile`` runs it in place of ``tasks.training``.

The training program as it is, with torch's profiler over a few steps of rank 0: milliseconds a step by kind of kernel, for how
long the GPU had nothing to do, and what Python did meanwhile. A point is logged within these steps; no checkpoint is saved.
"""

import functools
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback

from tasks.contracts.attempt import Attempt, run_rank
from tasks.training import train as program

FIRST, STEPS = 27, 5
"""Of points every ten steps and a checkpoint every twenty a point is within."""
LARGEST = 40
MARK = "in "
PARTS = (
    "get_batch_samples",
    "_read_step",
    "compute_loss",
    "training_step",
    "end_step",
    "log",
    "_maybe_log_save_evaluate",
)
"""Methods of the trainer that are told apart where the GPU waits."""
NO_KERNELS = ("## ", "Optimizer.", "ProfilerStep", "DistributedDataParallel.", "nccl:")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::_scaled_mm", "aten::bmm")
KINDS = (
    ("communication, also beside other work", ("nccl",)),
    ("attention", ("flash", "fmha", "sdpa", "cudnn_generated", "varlen", "attention")),
    ("compiled element-wise", ("triton",)),
    ("optimiser and gradient norm", ("multi_tensor", "foreach", "fused_adam", "lpnorm")),
    ("copies", ("memcpy", "memset")),
    ("other element-wise", ("elementwise", "reduce", "index", "cat", "gather", "scatter", "copy")),
)


class Profile(TrainerCallback):
    """Profiles :data:`STEPS` steps from step :data:`FIRST` on."""

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._rank = trainer, trainer.ranks.rank
        self._profile: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._rank or state.global_step not in (FIRST, FIRST + STEPS):
            return
        torch.cuda.synchronize()
        if state.global_step == FIRST:
            for name in PARTS:
                setattr(self._trainer, name, _marked(name, getattr(self._trainer, name)))
            self._profile = profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], record_shapes=True)
            self._profile.start()
            return
        self._profile.stop()
        tell(self._profile)


def _marked(name: str, method: Any) -> Any:
    @functools.wraps(method)
    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(MARK + name):
            return method(*args, **kwargs)

    return marked


def waits(kernels: Sequence[Any], parts: Sequence[Any]) -> dict[str, float]:
    """Microseconds without a kernel, by the innermost part of the program at the moment when the next one begins.

    Args:
        kernels: in the order in which they begin.
    """
    found: defaultdict[str, float] = defaultdict(float)
    end = kernels[0].time_range.start
    for kernel in kernels:
        start = kernel.time_range.start
        if start > end:
            around = [part for part in parts if part.time_range.start <= start <= part.time_range.end]
            innermost = min(around, key=lambda part: part.time_range.elapsed_us(), default=None)
            found[innermost.name if innermost else "between them"] += start - end
        end = max(end, kernel.time_range.end)
    return found


def tell(profiled: Any) -> None:
    """Print the tables: kinds of kernels, products by the matrices that they were called with, and single kernels."""
    # Those that begin so are parts of the program, not kernels, or name a kernel once more.
    kernels = [
        event
        for event in profiled.events()
        if event.device_type == DeviceType.CUDA and not event.name.startswith((*NO_KERNELS, MARK))
    ]
    kernels.sort(key=lambda event: event.time_range.start)
    kinds: defaultdict[str, float] = defaultdict(float)
    names: defaultdict[str, list[float]] = defaultdict(list)
    busy, end = 0.0, 0.0
    for kernel in kernels:
        start, stop = kernel.time_range.start, kernel.time_range.end
        kinds[kind_of(kernel.name)] += stop - start
        names[kernel.name].append(stop - start)
        busy, end = busy + max(0.0, stop - max(start, end)), max(end, stop)
    whole = end - min(kernel.time_range.start for kernel in kernels)
    kinds |= {"nothing to do": whole - busy, "a step": whole}
    for kind, value in sorted(kinds.items(), key=lambda pair: pair[1]):
        print(f"profile  {value / 1000 / STEPS:8.2f} ms a step  {kind}", flush=True)
    parts = [e for e in profiled.events() if e.device_type == DeviceType.CPU and e.name.startswith(MARK)]
    for name, value in sorted(waits(kernels, parts).items(), key=lambda pair: -pair[1]):
        print(f"profile  {value / 1000 / STEPS:8.2f} ms a step  nothing to do, {name}", flush=True)
    for name in sorted({part.name for part in parts}):
        taken = sum(part.time_range.elapsed_us() for part in parts if part.name == name)
        print(f"profile  {taken / 1000 / STEPS:8.2f} ms a step  of the processor, {name}", flush=True)
    for row in profiled.key_averages(group_by_input_shape=True):
        if row.key in PRODUCTS and (value := row.self_device_time_total):
            shapes = [tuple(shape) for shape in row.input_shapes if len(shape) == 2]
            print(f"profile  {value / 1000 / STEPS:8.2f} ms {row.count // STEPS:6} x {row.key} {shapes}", flush=True)
    for name, times in sorted(names.items(), key=lambda pair: -sum(pair[1]))[:LARGEST]:
        print(f"profile  {sum(times) / 1000 / STEPS:8.2f} ms {len(times) // STEPS:6} x {name[:110]}", flush=True)


def kind_of(kernel: str) -> str:
    """By the kernel's name."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS if any(word in name for word in words)), "products and others")


def profiled(attempt: Attempt) -> Any:
    """:func:`tasks.training.train.train` with the callback."""
    build = program.build_trainer

    def with_profile(*args: Any, **kwargs: Any) -> Any:
        trainer = build(*args, **kwargs)
        trainer.add_callback(Profile(trainer))
        return trainer

    program.build_trainer = with_profile  # type: ignore[assignment]
    return program.train(attempt)


if __name__ == "__main__":
    run_rank(profiled, sys.argv)
