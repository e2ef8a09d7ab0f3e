"""Training speed on a GPU: ``python -m tests.benchmarks.training_gpu [--steps 10] [--gpus 1]``.

Llama 3.1 8B's shape with random weights, LoRA of rank 64 on all linear layers, bfloat16. Two data sets: documents of 4,096
tokens with every position in the loss, and conversations of realistic lengths (lognormal, mean about 600, capped at 4,096)
with a quarter of them answers. The project's own training program under torchrun, against TRL's trainer as it comes on the
same rows, one after the other on the same machine. Useful tokens (no padding), wall clock, after warm-up; table last.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from tasks.contracts.attempt import read_points
from tasks.contracts.files import write_json
from tasks.contracts.settings import TrainingSettings
from tests.benchmarks.llama_8b import make_model
from tests.conftest import REPOSITORY

LONGEST = 4096
WARMUP_POINTS = 3
LORA = {"rank": 64, "alpha": 128}
CASES = {
    "documents of 4,096": {"global_batch_size": 4, "per_device_batch_size": 4},
    "conversations, mean 600": {"global_batch_size": 24, "per_device_batch_size": 24},
}


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


def ours(root: Path, model: Path, dataset: Path, steps: int, gpus: int, batch: dict[str, int]) -> dict[str, float]:
    """The training program as the pool runs it."""
    settings = TrainingSettings(
        global_batch_size=batch["global_batch_size"] * gpus,
        per_device_batch_size=batch["per_device_batch_size"],
        max_steps_per_epoch=steps,
        precision="bfloat16",
        save_every_steps=steps,
        log_every_steps=1,
        lora=LORA,
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
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}", "--module"]
    done = subprocess.run(
        [*command, "tasks.training", str(attempt / "spec.json")], cwd=REPOSITORY, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    speeds = [metrics["train/tokens_per_s_per_gpu"] for _, metrics in read_points(root / "job")][WARMUP_POINTS:]
    result = json.loads((attempt / "result.json").read_text())
    return {"tokens_per_s_per_gpu": statistics.median(speeds), "peak_gbytes": result["peak_memory_gbytes"]}


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
        for step in range(WARMUP_POINTS, steps)
    ]
    return {
        "tokens_per_s_per_gpu": statistics.median(speeds),
        "peak_gbytes": torch.cuda.max_memory_allocated() / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--trl", nargs=3, metavar=("MODEL", "DATASET", "BATCH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.trl:
        model, dataset, batch = arguments.trl
        print(json.dumps(trl(Path(model), Path(dataset), arguments.steps, int(batch))))
        return
    root = Path(tempfile.mkdtemp(prefix="training-gpu-"))
    model = make_model(root / "model")
    torch.cuda.empty_cache()
    rows = []
    for number, (case, batch) in enumerate(CASES.items()):
        dataset = root / f"rows-{number}"
        lengths = make_rows(dataset, case, batch["global_batch_size"] * arguments.gpus * arguments.steps)
        print(f"{case}: {len(lengths)} rows, {np.mean(lengths):.0f} tokens on average", flush=True)
        found = ours(root / f"ours-{number}", model, dataset, arguments.steps, arguments.gpus, batch)
        rows.append((case, "this project", found))
        print(rows[-1], flush=True)
        # As it comes it needs a small batch for long documents and pads the rest.
        size = 2 if case.startswith("documents") else 8
        command = [sys.executable, "-m", "tests.benchmarks.training_gpu", "--steps", "8"]
        done = subprocess.run(
            [*command, "--trl", str(model), str(dataset), str(size)],
            cwd=REPOSITORY, env=os.environ | {"CUDA_VISIBLE_DEVICES": "0"}, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        rows.append((case, "TRL as it comes", json.loads(done.stdout.splitlines()[-1])))
        print(rows[-1], flush=True)
    print(f"\n{torch.cuda.get_device_name()} x {arguments.gpus}, torch {torch.__version__}")
    for case, who, found in rows:
        print(
            f"{case:26} {who:16} {found['tokens_per_s_per_gpu']:8.0f} tokens/s/GPU  peak {found['peak_gbytes']:4.0f} GB"
        )


if __name__ == "__main__":
    main()
