"""LoRA supervised fine-tuning with TRL and PEFT: what every rank does, from token files to a saved adapter."""

import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from tasks.contracts.attempt import Attempt, read_points
from tasks.contracts.job import LEFT_EXIT_CODE
from tasks.contracts.settings import ModelSettings, TrainingSettings
from tasks.hardware.reference import chip_of
from tasks.hardware.telemetry import Sampler
from tasks.models.load import Resolved, device
from tasks.models.materialise import materialise
from tasks.models.memory import is_out_of_memory, peak_memory_gbytes
from tasks.training.adapter import save_adapter
from tasks.training.build import build_trainer, is_packed, precision_of, recomputed_one_in
from tasks.training.checkpoint_writer import CheckpointWriter
from tasks.training.checkpoints import clear_after, folder_of
from tasks.training.elastic import ROW, Elastic
from tasks.training.ledger import Ledger, Start, prove
from tasks.training.memory_plan import choose_micro_batch, footprint_of, free_bytes, on_processor
from tasks.training.merge import merge_adapter
from tasks.training.micro_batch import read_reduction, reduce
from tasks.training.order import balanced, training_order
from tasks.training.original import Original
from tasks.training.packed_trainer import PackedTrainer
from tasks.training.plan import TrainingPlan, plan_training
from tasks.training.rank_report import RankReports
from tasks.training.ranks import START_LIMIT_S, Ranks
from tasks.training.reporter import LOSS, MFU, SPEED, Reporter, say
from tasks.training.rows import load_rows, num_tokens
from tasks.training.sharded import Sharded, held_parameters
from tasks.training.start import agree_on_checkpoint, binding_of, check_inputs, on_rank_0, ranks_without_fp8
from tasks.training.stop_request import StopRequest
from tasks.training.useful_work import flops_per_token
from tasks.training.watchdog import Watchdog

SHARE_OF_FINAL_LOSS = 10
"""The final loss is the mean over the last tenth of the logged points."""


def train(attempt: Attempt) -> Mapping[str, Any] | None:
    """Train as the attempt's arguments say; rank 0 returns the result.

    Raises:
        SystemExit: with code 75 on every rank, when all saved and left because one was told to go.
        ValueError: on rank 0, the settings, rows and model do not fit each other; the other ranks leave.
    """
    arguments = attempt.arguments
    settings = TrainingSettings(**arguments["training"])
    output = Path(arguments["output"])
    checkpoints, rows_file = output / "checkpoints", Path(arguments["dataset"]) / "train.arrow"
    model, storage = ModelSettings(**arguments["model"]), Path(arguments["storage"])
    stop = StopRequest()
    stop.listen()
    limit_s = settings.collective_timeout_minutes * 60
    ranks = Ranks.join(limit_s)

    # Read by one, so that all take the same.
    reduction = read_reduction(output, settings.per_device_batch_size) if ranks.rank == 0 else None
    reduced, recompute = ranks.from_rank_0([reduction.use, int(reduction.recompute)] if reduction else [0, 0])
    if reduced:
        share = settings.global_batch_size // ranks.world_size
        # On another number of ranks the share may be another: then the most that divides it and is no more than what fitted.
        if settings.per_device_batch_size == "auto":
            reduced = max((size for size in range(1, reduced + 1) if share % size == 0), default=1)
        settings = settings.model_copy(update={"per_device_batch_size": reduced})
    if recompute and settings.gradient_checkpointing == "auto":
        settings = settings.model_copy(update={"gradient_checkpointing": recompute})
    rows = load_rows(rows_file, settings)
    lengths = num_tokens(rows)

    without_fp8 = ranks_without_fp8(ranks) if settings.fp8_base else []

    def check() -> list[int]:
        attempt.check_newest()
        check_inputs(settings, materialise(model, storage), lengths, ranks.world_size, without_fp8=without_fp8)
        return []

    on_rank_0(ranks, check, num_values=0)
    model_folder = materialise(model, storage)
    original = Original(model_folder) if ranks.rank == 0 else None
    plan = plan_training(settings, num_rows=len(rows), world_size=ranks.world_size)
    order = training_order(
        lengths,
        global_batch_size=settings.global_batch_size,
        steps_per_epoch=plan.steps_per_epoch,
        num_epochs=settings.num_epochs,
        seed=settings.seed,
    )
    settings = _with_micro_batch(settings, model_folder, lengths, order, ranks)
    # The same steps, shared out among micro-batches.
    plan = plan_training(settings, num_rows=len(rows), world_size=ranks.world_size)
    if is_packed(settings):
        order = balanced(
            order,
            lengths,
            global_batch_size=settings.global_batch_size,
            micro_batch_size=plan.per_device_batch_size,
        )
    watchdog = Watchdog(ranks, limit_s, say=say)
    reports, failed_checkpoints = RankReports(), list[str]()
    reporter = Reporter(attempt, plan, reports, failed_checkpoints)
    gpu = gpu_sampler()
    trainer = build_trainer(
        settings,
        plan,
        model_folder,
        # Numbered before they are put in order: each carries its number through the loaders.
        rows.select_columns(["input_ids", "labels"]).add_column(ROW, list(range(len(rows)))).select(order),
        output,
        callbacks=[reporter],
        ranks=ranks,
        watchdog=watchdog,
        stop=stop,
        say=say,
        lengths=lengths,
        reports=reports,
        gpu=gpu,
    )
    # After the weights: until here their digest had time.
    binding = binding_of(settings, plan, base_digest=original.digest(), rows_file=rows_file) if original else {}
    resumed = agree_on_checkpoint(ranks, checkpoints, binding, say=say)
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    held = held_parameters(trainer.model)
    reporter.flops_per_token = flops_per_token(trainer.model, lengths)
    # Products in FP8 have another peak, and only some are.
    reporter.peak_flops = 0.0 if settings.fp8_base else peak_flops(precision_of(settings))
    writer: CheckpointWriter | None = None
    ledger: Ledger | None = None
    if ranks.rank == 0:
        clear_after(checkpoints, resumed or 0)
        start = Start(
            attempt.folder.name,
            resumed or 0,
            ranks.world_size,
            settings.global_batch_size,
            plan.steps_per_epoch,
            len(rows),
        )
        ledger = Ledger(output / "ledger", start)
        writer = CheckpointWriter(
            checkpoints,
            attempt,
            binding,
            ranks.world_size,
            settings.keep_checkpoints,
            ledger.flush,
            say,
            failures=failed_checkpoints,
        )
        trainer.record_to(writer, ledger)
        if reduction is not None:
            say(
                f"OUT OF MEMORY before ({reduction.why}): this attempt takes {plan.per_device_batch_size} conversations at a "
                f"time instead of {reduction.tried} and accumulates {plan.accumulation_steps} times"
                f"{', activations recomputed' * reduction.recompute}; the global batch is the same"
            )
        say(
            f"{len(rows)} conversations, {plan.total_steps} steps of {settings.global_batch_size}: {ranks.world_size} "
            f"ranks x {plan.per_device_batch_size} x {plan.accumulation_steps} accumulated; {trainable:,} trainable "
            f"parameters, {precision_of(settings)}"
            + (f"; the base in shards, {held:,} parameters a rank" if isinstance(trainer, Sharded) else "")
            + (f"; going on from {folder_of(checkpoints, resumed).name}" if resumed is not None else "")
        )
    ranks.barrier("after loading the model", START_LIMIT_S)
    with gpu:
        _run(attempt, trainer, plan, watchdog, None if resumed is None else folder_of(checkpoints, resumed), output)
    if original is not None and not trainer.is_preempted:
        original.look_again()
    if writer is not None:
        writer.join()
    weights, held = trainer.weights(), held_parameters(trainer.model)
    # Nobody leaves before the last checkpoint is whole: the end of one rank is the end of all on its node.
    ranks.barrier("after the last checkpoint", START_LIMIT_S)
    ranks.leave()
    if trainer.is_preempted:
        raise SystemExit(LEFT_EXIT_CODE)
    if original is None or writer is None:
        return None

    attempt.check_newest()
    writer.flush_ledger(plan.total_steps)
    proof = prove(output / "ledger")
    original.check()
    save_adapter(trainer.model, weights, output / "adapter", original.digest())
    merged: Mapping[str, Any] = {}
    if settings.merge_adapter:
        adapter, digest = output / "adapter", original.digest()
        merged = merge_adapter(model_folder, adapter, rows, output / "merged", base_digest=digest)
    # Over all attempts: one that goes on from the last checkpoint has logged little itself, or nothing.
    points = [metrics for _, metrics in read_points(attempt.folder.parent) if LOSS in metrics]
    last = [point[LOSS] for point in points][-max(1, len(points) // SHARE_OF_FINAL_LOSS) :]
    return {
        "adapter": str(output / "adapter"),
        "base_weights_sha256": original.digest(),
        "final_loss": statistics.mean(last),
        **({"mfu": statistics.median(of_chip)} if (of_chip := [p[MFU] for p in points if MFU in p]) else {}),
        "tokens_per_s_per_gpu": statistics.median(point[SPEED] for point in points),
        "total_steps": plan.total_steps,
        "world_size": ranks.world_size,
        "per_device_batch_size": plan.per_device_batch_size,
        "trainable_parameters": trainable,
        "held_parameters": held,
        "precision": precision_of(settings),
        "peak_memory_gbytes": peak_memory_gbytes(),
        "num_starts": proof.num_starts,
        "num_steps_redone": proof.num_redone,
        "failed_checkpoints": writer.failures,
        "checkpoint_held_s": reports.checkpoint_s,
        **merged,
    }


def _with_micro_batch(
    settings: TrainingSettings, model_folder: Path, lengths: Sequence[int], order: Sequence[int], ranks: Ranks
) -> TrainingSettings:
    """The settings with numbers in place of ``auto``, by the GPU with the least free memory; all take the same."""
    if "auto" not in (settings.per_device_batch_size, settings.gradient_checkpointing):
        return settings
    free = min(row[0] for row in ranks.gather([free_bytes()]).wait())

    def look() -> list[int]:
        num_shards = ranks.world_size if settings.strategy != "ddp" else 1
        if not free:
            chosen = on_processor(settings)
        else:
            footprint = footprint_of(model_folder, settings, precision_of(settings), num_shards)
            chosen = choose_micro_batch(
                settings, lengths, order, ranks.world_size, footprint=footprint, free_bytes=free
            )
        say(chosen.why)
        return [chosen.per_device_batch_size, int(chosen.gradient_checkpointing)]

    size, recompute = on_rank_0(ranks, look, num_values=2)
    return settings.model_copy(update={"per_device_batch_size": size, "gradient_checkpointing": recompute})


def _run(
    attempt: Attempt, trainer: Elastic, plan: TrainingPlan, watchdog: Watchdog, checkpoint: Path | None, output: Path
) -> None:
    watchdog.start()
    try:
        with trainer.fast_kernels() if isinstance(trainer, PackedTrainer) else nullcontext():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        attempt.check_newest()
        size, step = plan.per_device_batch_size, trainer.state.global_step + 1
        why = f"rank {trainer.ranks.rank} ran out of memory in step {step} with {size} conversations at a time"
        asked = TrainingSettings(**attempt.arguments["training"])
        recompute = recomputed_one_in(trainer.args)
        may_recompute = asked.gradient_checkpointing == "auto" and recompute != 1
        already = read_reduction(output, asked.per_device_batch_size)
        raise reduce(
            output,
            tried=size,
            why=why,
            already=already,
            may_recompute=may_recompute,
            recompute=recompute,
        ) from error
    finally:
        watchdog.stop()


def gpu_sampler() -> Sampler:
    """Samples this rank's GPU once a second, where there is one and the driver tells; training does not depend on it."""
    import pynvml

    try:
        return Sampler.of(int(os.environ["LOCAL_RANK"]) if device().type == "cuda" else None, every_s=1.0)
    except (pynvml.NVMLError, IndexError) as error:
        say(f"GPU use, memory, power and temperature are not recorded: the driver does not tell ({error})")
        return Sampler(None)


def peak_flops(precision: Resolved) -> float:
    """What products reach on this rank's chip (``tasks/hardware/reference.yaml``), in operations a second; 0: not known."""
    chip = chip_of(torch.cuda.get_device_name()) if device().type == "cuda" else None
    return 0.0 if chip is None else chip.figures.get(f"matrix_product_{precision}_tflops_per_s", 0.0) * 1e12
