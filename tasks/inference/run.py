"""Inference as every rank does it: its share of the examples, then rank 0 gathers what all have written."""

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import PeftModel

from tasks.contracts.attempt import Attempt
from tasks.contracts.files import publish_folder, read_json, write_json
from tasks.contracts.prediction import Prediction, prediction_from_record, prediction_to_record
from tasks.contracts.settings import InferenceSettings, ModelSettings
from tasks.dataset.prepare import read_examples
from tasks.dataset.rendering.family import detect_family, family_for
from tasks.inference.generate import generate
from tasks.models.load import load_model, load_tokenizer, resolve_precision
from tasks.models.materialise import materialise, weights_digest


def run(attempt: Attempt) -> Mapping[str, Any] | None:
    """Answer the test examples as the attempt's arguments say; rank 0 returns the result."""
    arguments = attempt.arguments
    settings = InferenceSettings(**arguments["inference"])
    model_settings = ModelSettings(**arguments["model"])
    output = Path(arguments["output"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

    folder = materialise(model_settings, Path(arguments["storage"]))
    tokenizer = load_tokenizer(folder)
    family = family_for(detect_family(folder) if model_settings.family == "auto" else model_settings.family, tokenizer)
    precision = resolve_precision(settings.precision)
    model = load_model(folder, precision)
    adapter = Path(arguments["adapter"]) if arguments["adapter"] else None
    if adapter is not None:
        check_base(adapter, folder)
        # The adapter in the weights' own precision, as serving engines load it: no cast to float32 and back per layer.
        model = merge(PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False), precision)
    model.eval()

    examples = read_examples(Path(arguments["dataset"]) / "test.parquet")
    # Dealt out by length, so that every rank has as much to do.
    examples.sort(key=lambda e: (len(e.request) + len(str(e.tools)), e.id))
    mine = examples[rank::world_size]
    if rank == 0:
        what = f"with the adapter {adapter}" if adapter else "as it is"
        print(f"{len(examples)} requests to {model_settings.name} {what}, {world_size} ranks, {precision}")

    def on_done(done: int) -> None:
        if rank == 0:
            attempt.report_progress(min(len(examples), done * world_size), len(examples), "requests")
            print(f"{min(len(examples), done * world_size)}/{len(examples)} requests answered")

    began = time.perf_counter()
    predictions = list(
        generate(
            model,
            tokenizer,
            family,
            mine,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            on_done=on_done,
        )
    )
    seconds = time.perf_counter() - began
    write_predictions(predictions, attempt.folder / f"predictions-{rank}.parquet")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if rank != 0:
        return None
    return _gather(attempt, output, world_size, [e.id for e in examples], seconds, precision)


def merge(model: PeftModel, precision: str) -> Any:
    """The adapter added to the weights where float32 makes that exact; in bfloat16 it stays beside them."""
    return model.merge_and_unload() if precision == "float32" else model


def check_base(adapter: Path, base: Path) -> None:
    """Refuse an adapter that was trained on other weights.

    Raises:
        ValueError: the digests differ, or the adapter does not say what it was trained on.
    """
    manifest = adapter / "manifest.json"
    if not manifest.exists():
        raise ValueError(f"{adapter} is not a finished adapter: {manifest} is missing")
    trained_on = read_json(manifest)["base_weights_sha256"]
    if trained_on != (here := weights_digest(base)):
        raise ValueError(f"{adapter} was trained on weights {trained_on[:12]}, the model in {base} has {here[:12]}")


def write_predictions(predictions: Sequence[Prediction], path: Path) -> None:
    """Predictions as Parquet."""
    schema = pa.schema(
        [
            ("example_id", pa.string()),
            ("text", pa.string()),
            ("num_prompt_tokens", pa.int32()),
            ("num_new_tokens", pa.int32()),
            ("was_cut", pa.bool_()),
            ("latency_s", pa.float64()),
            ("strict_calls", pa.string()),
            ("strict_error", pa.string()),
            ("lenient_calls", pa.string()),
            ("lenient_error", pa.string()),
        ]
    )
    pq.write_table(pa.Table.from_pylist([prediction_to_record(p) for p in predictions], schema=schema), path)


def _gather(
    attempt: Attempt, output: Path, world_size: int, example_ids: Sequence[str], seconds: float, precision: str
) -> Mapping[str, Any]:
    """One file of all ranks' predictions, in the order of the examples' ids.

    Raises:
        RuntimeError: an example was answered twice or not at all.
    """
    predictions = [
        prediction_from_record(record)
        for rank in range(world_size)
        for record in pq.read_table(attempt.folder / f"predictions-{rank}.parquet").to_pylist()
    ]
    predictions.sort(key=lambda p: p.example_id)
    if [p.example_id for p in predictions] != sorted(example_ids):
        raise RuntimeError(f"{len(predictions)} predictions do not match {len(example_ids)} examples one to one")
    attempt.check_newest()
    temporary = output.with_name(f".{output.name}.{attempt.folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_predictions(predictions, temporary / "predictions.parquet")
    num_new_tokens = sum(p.num_new_tokens for p in predictions)
    manifest = {
        "num_predictions": len(predictions),
        "num_new_tokens": num_new_tokens,
        "new_tokens_per_s": num_new_tokens / seconds,
        "generation_s": seconds,
        "num_cut": sum(p.was_cut for p in predictions),
        "precision": precision,
    }
    write_json(temporary / "manifest.json", manifest)
    publish_folder(temporary, output)
    return manifest
