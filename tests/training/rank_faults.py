"""Faults that a test plants in a rank, at the boundary to torch: the model's forward pass and the storage's size."""

import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch


def plant(rank: int, faults: Mapping[str, Any]) -> None:
    """Plant what ``faults`` say.

    ``pause_s``: seconds every forward pass takes longer.
    ``slow``: ``{"rank": 1, "seconds": 0.1}``; every forward pass of that rank takes so much longer.
    ``environment``: variables that the ranks have.
    ``memory_rows``: a forward pass of more rows than this is out of memory.
    ``hang``, ``nan``, ``overflow``, ``signal``: ``{"rank": 1, "forward": 7}``; the rank's 7th forward pass never ends, has a
    loss that is no number, has an infinite gradient of a finite loss, or gets the signal ``number``.
    ``hang_at_point``: ``{"rank": 1, "step": 6}``; the rank's point of that step's curve is never there.
    ``free_bytes``: what the disk says is free.
    ``packed``: no fault: training goes as on a GPU, conversations end to end and the head frozen; the log names what is called.
    ``compiled``: layers are compiled by torch's backend of that name, without the C++ compiler; else they are not.
    ``events``: no fault: a file in which rank 0 notes when it reads a step's rows and when it logs a step's point.
    ``count_layers``: no fault: a file for how often each layer's forward pass ran on rank 0, recomputed ones again.
    """
    count = 0

    def before(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal count
        count += 1
        time.sleep(faults.get("pause_s", 0))
        if faults.get("slow", {}).get("rank") == rank:
            time.sleep(faults["slow"]["seconds"])
        if kwargs["input_ids"].shape[0] > faults.get("memory_rows", 1 << 30):
            raise torch.OutOfMemoryError("CUDA out of memory (planted)")
        here = {
            name
            for name in ("hang", "nan", "overflow", "signal")
            if faults.get(name) and _is_here(faults[name], rank, count)
        }
        if "hang" in here:
            time.sleep(600)
        if "nan" in here:
            with torch.no_grad():
                module.lm_head.weight.fill_(float("nan"))
        if "overflow" in here:
            _overflow_once(module.model.norm)
        if "signal" in here:
            os.kill(os.getpid(), faults["signal"].get("number", signal.SIGTERM))

    from transformers import LlamaForCausalLM

    def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if isinstance(module, LlamaForCausalLM):
            before(module, args, kwargs)

    init = LlamaForCausalLM.__init__

    def with_hook(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.register_forward_pre_hook(hook, with_kwargs=True)

    LlamaForCausalLM.__init__ = with_hook
    if faults.get("packed"):
        _pack(faults.get("compiled"))
    if rank == 0 and "count_layers" in faults:
        _count_layers(Path(faults["count_layers"]))
    if rank == 0 and "events" in faults:
        _note_events(Path(faults["events"]))
    if faults.get("hang_at_point", {}).get("rank") == rank:
        _hang_at_point(faults["hang_at_point"]["step"])
    if "free_bytes" in faults:
        usage = shutil.disk_usage("/")
        shutil.disk_usage = lambda path: usage._replace(free=faults["free_bytes"])


def _is_here(fault: Mapping[str, int], rank: int, count: int) -> bool:
    return fault["rank"] == rank and fault["forward"] == count


def _overflow_once(norm: torch.nn.Module) -> None:
    def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: gradient * float("inf"))
        handle.remove()

    handle = norm.register_forward_hook(hook)


def _pack(backend: str | None) -> None:
    from tasks.training import build, packed_trainer, train

    def told(function: Callable[..., Any]) -> Callable[..., Any]:
        def tell(*args: Any, **kwargs: Any) -> Any:
            print(function.__name__, flush=True)
            return function(*args, **kwargs)

        return tell

    build.is_packed = train.is_packed = lambda settings: True
    compile_layers = told(packed_trainer.compile_layers)
    packed_trainer.compile_layers = (
        (lambda model: None) if backend is None else partial(compile_layers, backend=backend)
    )
    packed_trainer.frozen_head_loss = told(packed_trainer.frozen_head_loss)


def _note_events(file: Path) -> None:
    from tasks.training.elastic import Elastic

    read, log = Elastic._read_step, Elastic.log

    def noted_read(self: Any, *args: Any) -> Any:
        with file.open("a") as lines:
            lines.write(f"read {self.state.global_step + 1}\n")
        return read(self, *args)

    def noted_log(self: Any, logs: dict[str, float], *args: Any) -> None:
        if "loss" in logs:
            with file.open("a") as lines:
                lines.write(f"log {self.state.global_step}\n")
        log(self, logs, *args)

    Elastic._read_step, Elastic.log = noted_read, noted_log


def _hang_at_point(step: int) -> None:
    from tasks.training.elastic import Elastic

    log = Elastic._maybe_log_save_evaluate

    def hanging(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step == step:
            time.sleep(600)
        log(self, *args, **kwargs)

    Elastic._maybe_log_save_evaluate = hanging


def _count_layers(file: Path) -> None:
    # Inside the layer: transformers recomputes nothing of a layer whose own forward pass is another.
    from transformers.models.llama.modeling_llama import LlamaAttention

    counts: Counter[int] = Counter()
    forward = LlamaAttention.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts[self.layer_idx] += 1
        file.write_text(json.dumps(counts))
        return forward(self, *args, **kwargs)

    LlamaAttention.forward = counted
