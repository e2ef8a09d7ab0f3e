"""Inference as every rank does it: its share of the examples, then rank 0 gathers what all have written."""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tasks.contracts.attempt import Attempt
from tasks.contracts.conversation import Example
from tasks.contracts.files import publish_folder, read_json, write_json, write_text
from tasks.contracts.prediction import Prediction, prediction_from_record, prediction_to_record
from tasks.contracts.settings import InferenceSettings, ModelSettings
from tasks.dataset.bfcl import read_bfcl
from tasks.dataset.rendering.family import Family, detect_family, encode_prompt, family_for
from tasks.dataset.stored import read_examples
from tasks.inference.adapted import check_base, load
from tasks.inference.endpoint import Endpoint
from tasks.inference.generate import generate
from tasks.inference.losses import LossSum, answer_loss, plain_conversations
from tasks.inference.partial import PartialAnswers, answered_before, read_partial
from tasks.inference.vllm_server import Serving, gpu_of_this_rank, serving
from tasks.models.load import Resolved, load_tokenizer, resolve_precision
from tasks.models.materialise import materialise
from tasks.models.memory import peak_memory_gbytes


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
    adapter = Path(arguments["adapter"]) if arguments["adapter"] else None
    if adapter is not None:
        check_base(adapter, folder)
    computed = resolve_precision(settings.precision)
    precision = f"{settings.endpoint.api} endpoint" if settings.endpoint else computed
    if settings.engine == "vllm":
        precision += ", vLLM"
    model = load(folder, adapter, computed) if settings.engine == "transformers" else None

    examples = read_examples(Path(arguments["dataset"]) / "test.parquet")
    held_out = list(examples)
    if "bfcl" in settings.suites:
        examples += [row.example for row in read_bfcl(settings.suite_rows_per_category)]
    before = _agree_on_done(attempt, rank)
    left = [e for e in examples if e.id not in {p.example_id for p in before}]
    # Dealt out by length, so that every rank has as much to do.
    left.sort(key=lambda e: (len(e.request) + len(str(e.tools)), e.id))
    if rank == 0:
        what = f"with the adapter {adapter}" if adapter else "as it is"
        done = f", {len(before)} of them answered by an earlier attempt" if before else ""
        print(f"{len(examples)} requests to {model_settings.name} {what}{done}, {world_size} ranks, {precision}")

    def on_done(done: int) -> None:
        if rank == 0:
            total = min(len(examples), len(before) + done * world_size)
            attempt.report_progress(total, len(examples), "requests")
            print(f"{total}/{len(examples)} requests answered")

    sizes: list[int] = []

    def on_smaller(batch_size: int) -> None:
        sizes.append(batch_size)
        print(
            f"OUT OF MEMORY: rank {rank} goes on with {batch_size} requests at a time; inference.batch_size asks for more"
        )

    partial = PartialAnswers(attempt, rank)
    mine = left[rank::world_size]
    began = time.perf_counter()
    if model is None:
        num_done = 0

        def on_prediction(prediction: Prediction) -> None:
            nonlocal num_done
            partial.add([prediction])
            num_done += 1
            if num_done % settings.batch_size == 0 or num_done == len(mine):
                on_done(num_done)

        with _served(
            settings, folder, adapter, computed, _longest(examples, tokenizer, family), attempt, rank
        ) as served:
            began = time.perf_counter()
            asked = (settings.max_new_tokens, settings.temperature, settings.seed, served.key)
            Endpoint(served.endpoint, served.name, tokenizer, family, *asked).ask(mine, on_prediction)
            seconds = time.perf_counter() - began
        figures = RankFigures(seconds, None, 0, LossSum(), LossSum())
    else:
        rows = sorted(held_out, key=lambda e: e.id)[: settings.num_loss_rows]
        losses: dict[str, LossSum] = {}
        answers = generate(
            model,
            tokenizer,
            family,
            mine,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=settings.seed,
            references=[row.id for row in rows],
            on_done=on_done,
            on_smaller=on_smaller,
            on_reference=losses.__setitem__,
        )
        # On disk batch by batch, as they come.
        for prediction in answers:
            partial.add([prediction])
        seconds = time.perf_counter() - began
        # Those that an earlier attempt answered, and all where reading a prompt does not give them.
        answered, own = {p.example_id for p in before}, {e.id for e in mine}
        of_before = [row for row in rows if row.id in answered][rank::world_size]
        missing = [row for row in rows if row.id in own and row.id not in losses]
        reference = sum(losses.values(), answer_loss(model, tokenizer, family, of_before + missing))
        plain = answer_loss(model, tokenizer, family, plain_conversations()[rank::world_size])
        figures = RankFigures(seconds, peak_memory_gbytes(), len(sizes), reference, plain)
    write_json(attempt.folder / f"figures-{rank}.json", asdict(figures))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if rank != 0:
        return None
    return _gather(attempt, output, world_size, before, [e.id for e in examples], precision)


@contextmanager
def _served(
    settings: InferenceSettings,
    folder: Path,
    adapter: Path | None,
    precision: Resolved,
    longest_prompt_tokens: int,
    attempt: Attempt,
    rank: int,
) -> Iterator[Serving]:
    """The server that is asked: the settings' own, or one of this rank's."""
    if settings.endpoint is not None:
        yield Serving(settings.endpoint, settings.endpoint.finetuned if adapter else settings.endpoint.original, None)
        return
    assert settings.vllm is not None
    log = attempt.folder / f"vllm-{rank}.log"
    began = time.perf_counter()
    if rank == 0:
        print(f"vLLM starts on every rank; what it says stands in {log.parent}/vllm-*.log")
    with serving(
        settings.vllm,
        folder,
        adapter,
        precision=precision,
        max_tokens=longest_prompt_tokens + settings.max_new_tokens,
        device=gpu_of_this_rank(),
        log=log,
    ) as served:
        if rank == 0:
            print(f"vLLM serves after {time.perf_counter() - began:.0f} s")
        yield served


def _longest(examples: Sequence[Example], tokenizer: Any, family: Family) -> int:
    return max((len(encode_prompt(tokenizer, family, example)) for example in examples), default=1)


@dataclass(frozen=True)
class RankFigures:
    """What one rank measured: seconds of generation, memory, halved batches, losses."""

    seconds: float
    peak_memory_gbytes: float | None
    num_memory_retries: int
    reference: LossSum
    plain: LossSum


def _agree_on_done(attempt: Attempt, rank: int) -> list[Prediction]:
    """What earlier attempts answered, as rank 0 found it: files could grow while ranks read them one after the other."""
    path = attempt.folder / "answered-before.jsonl"
    if rank == 0:
        write_text(path, "".join(json.dumps(prediction_to_record(p)) + "\n" for p in answered_before(attempt)))
    torch.distributed.barrier()
    return [prediction_from_record(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


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
    attempt: Attempt,
    output: Path,
    world_size: int,
    before: Sequence[Prediction],
    example_ids: Sequence[str],
    precision: str,
) -> Mapping[str, Any]:
    """One file of all ranks' predictions, in the order of the examples' ids.

    Raises:
        RuntimeError: an example was answered twice or not at all.
    """
    known = {p.example_id for p in before}
    # A requeued attempt's folder holds answers from before as well.
    made_here = [p for p in read_partial(attempt.folder) if p.example_id not in known]
    predictions = sorted([*before, *made_here], key=lambda p: p.example_id)
    if [p.example_id for p in predictions] != sorted(example_ids):
        raise RuntimeError(f"{len(predictions)} predictions do not match {len(example_ids)} examples one to one")
    attempt.check_newest()
    temporary = output.with_name(f".{output.name}.{attempt.folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_predictions(predictions, temporary / "predictions.parquet")
    figures = [read_json(attempt.folder / f"figures-{rank}.json") for rank in range(world_size)]
    seconds = max(f["seconds"] for f in figures)
    reference, plain = (sum((LossSum(**f[k]) for f in figures), LossSum()) for k in ("reference", "plain"))
    percentiles = np.percentile([p.latency_s for p in predictions], [50, 95, 99])
    manifest = {
        "num_predictions": len(predictions),
        "num_new_tokens": sum(p.num_new_tokens for p in predictions),
        # Of this attempt: the seconds of an earlier one are not known to the end.
        "new_tokens_per_s": sum(p.num_new_tokens for p in made_here) / seconds if made_here else None,
        "generation_s": seconds,
        "num_answered_before": len(before),
        "latency_s": dict(zip(("p50", "p95", "p99"), map(float, percentiles), strict=True)),
        "num_cut": sum(p.was_cut for p in predictions),
        "peak_memory_gbytes": max((f["peak_memory_gbytes"] for f in figures if f["peak_memory_gbytes"]), default=None),
        "num_memory_retries": sum(f["num_memory_retries"] for f in figures),
        "reference_loss": reference.mean,
        "plain_loss": plain.mean,
        "precision": precision,
    }
    write_json(temporary / "manifest.json", manifest)
    publish_folder(temporary, output)
    return manifest
