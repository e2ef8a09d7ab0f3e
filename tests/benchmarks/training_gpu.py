"""Training speed on a GPU: ``python -m tests.benchmarks.training_gpu [--steps 50] [--gpus 1] [--who bfloat16 fp8 trl]``.

Llama 3.1 8B's shape with random weights, LoRA of rank 64 on all linear layers, bfloat16. Two data sets: documents of 4,096
tokens with every position in the loss, and conversations of realistic lengths (lognormal, mean about 600, capped at 4,096)
with a quarter of them answers. The project's own training program under torchrun, with micro-batch and recomputation left to
``auto``, with and without ``fp8_base``, against TRL's trainer as it comes on the same rows, one after the other on the same
machine. Useful tokens (no padding), wall clock, after warm-up, between checkpoints, whose time is told apart. First what
bounds a step is timed by itself (``step_bound.py``). Table last.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from tasks.contracts.attempt import read_points
from tasks.contracts.files import write_json
from tasks.contracts.settings import TrainingSettings
from tasks.hardware.host import free_port
from tests.benchmarks.llama_8b import make_model
from tests.benchmarks.step_bound import LONGEST, measure
from tests.conftest import REPOSITORY

WARMUP_STEPS = 10
TRL_STEPS, TRL_WARMUP_STEPS = 8, 3
POINT_STEPS = 10
"""As the program does by itself: every point waits for the GPU, which then has nothing to do for a moment."""
LORA = {"rank": 64, "alpha": 128}
WHO = {
    "bfloat16": "this project",
    "fp8": "this project, fp8_base",
    "network": "this project, a GPU a node",
    "trl": "TRL as it comes",
}
OVER_NETWORK = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
"""Makes GPUs of one machine talk as those of several do."""
CASES = {"documents of 4,096": 4, "conversations, mean 600": 24}
"""Rows of an optimiser step per GPU; about 16,000 tokens."""
TOLD = ("step ", "conversations at a time", "fp8_base", "profile  ")
"""Lines of the program that are of interest here."""
HELD, SLOWEST = "train/checkpoint_held_seconds", "train/slowest_rank_work_ratio"


def make_rows(folder: Path, case: str, num_rows: int) -> list[int]:
    folder.mkdir(parents=True)
    draw = np.random.default_rng(7)
    if case.startswith("documents"):
        lengths, taught = np.full(num_rows, LONGEST), 1.0
    else:
        # Of the normal behind it: mean 6.0, deviation 0.9.
        lengths, taught = np.clip(draw.lognormal(6.0, 0.9, num_rows).astype(int), 16, LONGEST), 0.25
    ids = [draw.integers(2, 128_000, length) for length in lengths]
    labels = [np.where(np.arange(len(row)) < len(row) * (1 - taught), -100, row) for row in ids]
    integers = pa.list_(pa.int32())
    table = pa.table({"input_ids": pa.array(ids, integers), "labels": pa.array(labels, integers)})
    with pa.OSFile(str(folder / "train.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return [int(length) for length in lengths]


def ours(
    root: Path,
    model: Path,
    dataset: Path,
    steps: int,
    gpus: int,
    batch: int,
    *,
    who: str,
    dropout: float,
    strategy: str,
    attention: str,
    recompute: bool | str,
    is_profiled: bool,
) -> dict[str, Any]:
    """The training program as the pool runs it, with checkpoints on the way.

    Args:
        who: of :data:`WHO`; ``network``: every GPU is an emulated node of its own.
    """
    settings = TrainingSettings(
        global_batch_size=batch * gpus,
        per_device_batch_size="auto",
        gradient_checkpointing=recompute,
        max_steps_per_epoch=steps,
        precision="bfloat16",
        fp8_base=who == "fp8",
        strategy=strategy,
        attention=attention,
        # Often enough to be seen, seldom enough for points between, which are those that tell the speed.
        save_every_steps=max(steps // 4, 2 * POINT_STEPS),
        log_every_steps=POINT_STEPS,
        lora=LORA | {"dropout": dropout},
    )
    attempt = root / "job" / "001"
    attempt.mkdir(parents=True)
    arguments = {
        "model": {"name": str(model)},
        "training": settings.model_dump(mode="json"),
        "storage": str(root),
        "dataset": str(dataset),
        "output": str(root / "training"),
    }
    write_json(attempt / "spec.json", {"arguments": arguments})
    (root / "job" / "NEWEST").write_text("001")
    program = "tests.benchmarks.training_profile" if is_profiled else "tasks.training"
    nodes = gpus if who == "network" else 1
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={gpus // nodes}"]
    command += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    logs, agents = [attempt / f"node-{node}.log" for node in range(nodes)], []
    for node, log in enumerate(logs):
        own = OVER_NETWORK | {"CUDA_VISIBLE_DEVICES": str(node)} if who == "network" else {}
        with log.open("w") as file:
            agents.append(
                subprocess.Popen(
                    [*command, f"--node-rank={node}", "--module", program, str(attempt / "spec.json")],
                    cwd=REPOSITORY,
                    env=os.environ | own,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    if any(follow(agents, logs[0])):
        raise SystemExit("\n".join(log.read_text()[-6000:] for log in logs))
    told_points = read_points(root / "job")
    print(f"loss {told_points[0][1]['train/loss']:.4f} to {told_points[-1][1]['train/loss']:.4f} nats", flush=True)
    points = [metrics for step, metrics in told_points if step > WARMUP_STEPS]
    quiet = [p for p in points if HELD not in p]
    if not quiet:
        raise SystemExit(f"every point of {steps} steps has a checkpoint in it: more --steps, please")
    step_s = statistics.median(p["train/step_seconds"] for p in quiet)
    if slowest := [p[SLOWEST] for p in points if SLOWEST in p]:
        print(f"work of the slowest rank: {statistics.median(slowest):.3f} times the median's", flush=True)
    if held := [p[HELD] for p in points if HELD in p]:
        shares = ", ".join(f"{one:.2f} s, {one / (50 * step_s):.2%} of 50 steps" for one in held)
        print(f"checkpoints held training up for {shares}", flush=True)
    result = json.loads((attempt / "result.json").read_text())
    return {
        "tokens_per_s_per_gpu": statistics.median(p["train/tokens_per_s_per_gpu"] for p in quiet),
        "peak_gbytes": result["peak_memory_gbytes"],
        "losses": [p["train/loss"] for _, p in told_points],
    }


def follow(agents: Sequence["subprocess.Popen[bytes]"], log: Path) -> list[int]:
    """Show what is told of interest as it comes, until all have ended: their exit codes. One that fails ends the others."""
    shown, start = 0, time.monotonic()
    try:
        while True:
            codes = [agent.poll() for agent in agents]
            is_over = any(codes) or None not in codes
            lines = log.read_text(errors="replace").split("\n")
            # The last may be half of one.
            whole = lines if is_over else lines[:-1]
            for line in whole[shown:]:
                if any(word in line for word in TOLD):
                    print(f"{time.monotonic() - start:5.0f} s  {line}", flush=True)
            shown = len(whole)
            if is_over:
                break
            time.sleep(1)
    finally:
        for agent in agents:
            if agent.poll() is None:
                agent.terminate()
    return [agent.wait() for agent in agents]


def trl(model: Path, dataset: Path, steps: int, batch_size: int) -> dict[str, float]:
    """TRL's trainer as it comes, except that the weights are loaded in bfloat16 and nothing is cut."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            torch.cuda.synchronize()
            times.append(time.perf_counter())

    rows = Dataset.from_file(str(dataset / "train.arrow"))
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        bf16=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",
        save_strategy="no",
        train_sampling_strategy="sequential",
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).cuda(),
        args=config,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(
            r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[Clock()],
    )
    trainer.train()
    lengths = [len(row) for row in rows[: steps * batch_size]["input_ids"]]
    speeds = [
        sum(lengths[step * batch_size : (step + 1) * batch_size]) / (times[step] - times[step - 1])
        for step in range(TRL_WARMUP_STEPS, steps)
    ]
    return {
        "tokens_per_s_per_gpu": statistics.median(speeds),
        "peak_gbytes": torch.cuda.max_memory_allocated() / 1e9,
    }


def compare_losses(who: str, exact: Sequence[float], other: Sequence[float]) -> str:
    """How far one curve is from this project's in bfloat16 on one node, relative."""
    apart = [abs(a - b) / b for a, b in zip(other, exact, strict=True)]
    return (
        f"losses of {len(apart)} steps, {who} and in bfloat16 on one node: {max(apart):.3%} apart at most, "
        f"{statistics.mean(apart):.3%} on average; {exact[0]:.4f} to {exact[-1]:.4f} and {other[0]:.4f} to {other[-1]:.4f} nats"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=50, help=f"at least {2 * POINT_STEPS}; with --profile 40 to 99")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--who", nargs="+", choices=WHO, default=["bfloat16", "fp8", "trl"])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--model", type=Path, help="folder that keeps the 16 GB of weights from one call to the next")
    parser.add_argument("--accumulation", type=int, default=1, help="so many times the rows a step, ours only")
    parser.add_argument("--dropout", type=float, default=0.0, help="of LoRA, ours only")
    parser.add_argument("--strategy", choices=["ddp", "fsdp", "zero3"], default="ddp", help="ours only")
    parser.add_argument("--attention", choices=["varlen", "flex"], default="varlen", help="ours only")
    parser.add_argument("--recompute", action="store_true", help="all activations, ours only")
    parser.add_argument("--no-bound", action="store_true", help="leave out what bounds a step")
    parser.add_argument(
        "--profile", action="store_true", help="say where a step's time goes on the GPU; it makes steps slower"
    )
    parser.add_argument("--trl", nargs=3, metavar=("MODEL", "DATASET", "BATCH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.trl and arguments.steps < 2 * POINT_STEPS:
        parser.error(f"--steps {arguments.steps}: points are {POINT_STEPS} steps apart, of which the first is warm-up")
    if arguments.profile and not 40 <= arguments.steps < 100:
        parser.error(
            f"--steps {arguments.steps}: --profile looks at steps with a point and without a checkpoint: 40 to 99"
        )
    if arguments.trl:
        model, dataset, batch = arguments.trl
        print(json.dumps(trl(Path(model), Path(dataset), arguments.steps, int(batch))))
        return
    options = {name: getattr(arguments, name) for name in ("dropout", "strategy", "attention")}
    options |= {"recompute": arguments.recompute or "auto", "is_profiled": arguments.profile}
    bound = None if arguments.no_bound else measure(LORA["rank"])
    torch.cuda.empty_cache()
    root = Path(tempfile.mkdtemp(prefix="training-gpu-"))
    model = arguments.model or root / "model"
    if not (model / "config.json").exists():
        make_model(model)
    torch.cuda.empty_cache()
    rows = []
    for number, case in enumerate(arguments.case):
        batch = CASES[case] * arguments.accumulation
        dataset = root / f"rows-{number}"
        lengths = make_rows(dataset, case, batch * arguments.gpus * arguments.steps)
        print(f"{case}: {len(lengths)} rows, {np.mean(lengths):.0f} tokens on average", flush=True)
        losses = {}
        for who in arguments.who:
            folder = root / f"{who}-{number}"
            if who == "trl":
                found = trl_alone(model, dataset, case)
            else:
                found = ours(folder, model, dataset, arguments.steps, arguments.gpus, batch, **options, who=who)
                losses[who] = found.pop("losses")
            rows.append((case, WHO[who], found))
            print(rows[-1], flush=True)
        if exact := losses.pop("bfloat16", None):
            print(*(compare_losses(WHO[who], exact, other) for who, other in losses.items()), sep="\n", flush=True)
    print(f"\n{torch.cuda.get_device_name()} x {arguments.gpus}, torch {torch.__version__}")
    if bound:
        print(f"what a step of documents cannot be faster than:\n{bound}")
    for case, who, found in rows:
        print(
            f"{case:26} {who:26} {found['tokens_per_s_per_gpu']:8.0f} tokens/s/GPU  peak {found['peak_gbytes']:4.0f} GB"
        )


def trl_alone(model: Path, dataset: Path, case: str) -> dict[str, Any]:
    """:func:`trl` in a process of its own, which gives the memory back."""
    # As it comes it needs a small batch for long documents and pads the rest.
    size = 2 if case.startswith("documents") else 8
    command = [sys.executable, "-m", "tests.benchmarks.training_gpu", "--steps", str(TRL_STEPS)]
    done = subprocess.run(
        [*command, "--trl", str(model), str(dataset), str(size)],
        cwd=REPOSITORY, env=os.environ | {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]},
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
