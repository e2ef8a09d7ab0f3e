"""LoRA supervised fine-tuning with TRL and PEFT: what every rank does, from token files to a saved adapter."""

import itertools
import os
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PrinterCallback
from trl import SFTConfig, SFTTrainer

from tasks.contracts.attempt import Attempt, read_points
from tasks.contracts.files import publish_folder, write_json
from tasks.contracts.settings import LoraSettings, ModelSettings, TrainingSettings
from tasks.dataset.prepare import IGNORED
from tasks.dataset.split import permutation
from tasks.models.load import Resolved, device, load_model, load_tokenizer, quiet_loading, resolve_precision
from tasks.models.materialise import materialise, weights_digest
from tasks.training.answer_only_loss import AnswerOnlyTrainer
from tasks.training.checkpoints import MarkComplete, newest_valid
from tasks.training.order import training_order
from tasks.training.plan import TrainingPlan, plan_training
from tasks.training.reporter import LOSS, SPEED, Reporter

SHARE_OF_FINAL_LOSS = 10
"""The final loss is the mean over the last tenth of the logged points."""

EAGER_ATTENTION_TOKENS = 512
"""Up to this length plain products are the faster attention on a CPU (a tenth of a step at 160 tokens); beyond it their
matrix of scores takes more memory than it saves time."""


def train(attempt: Attempt) -> Mapping[str, Any] | None:
    """Train as the attempt's arguments say; rank 0 returns the result."""
    arguments = attempt.arguments
    settings = TrainingSettings(**arguments["training"])
    output = Path(arguments["output"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    model_folder = materialise(ModelSettings(**arguments["model"]), Path(arguments["storage"]))
    rows = load_rows(Path(arguments["dataset"]) / "train.arrow", settings)
    plan = plan_training(settings, num_rows=len(rows), world_size=world_size)
    digest_before = weights_digest(model_folder) if rank == 0 else ""

    lengths = num_tokens(rows)
    order = training_order(
        lengths,
        global_batch_size=settings.global_batch_size,
        steps_per_epoch=plan.steps_per_epoch,
        num_epochs=settings.num_epochs,
        seed=settings.seed,
    )
    ordered = rows.select(order)
    trainer = build_trainer(attempt, settings, plan, model_folder, ordered, max(lengths), output / "checkpoints")
    checkpoint = newest_valid(output / "checkpoints")
    if rank == 0:
        trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        print(
            f"{len(rows)} conversations, {plan.total_steps} steps of {settings.global_batch_size}: {world_size} ranks x "
            f"{plan.per_device_batch_size} x {plan.accumulation_steps} accumulated; {trainable:,} trainable parameters, "
            f"{precision_of(settings)}" + (f"; going on from {checkpoint.name}" if checkpoint else "")
        )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if rank != 0:
        return None

    digest_after = weights_digest(model_folder)
    if digest_after != digest_before:
        raise RuntimeError(f"the original model in {model_folder} changed during training: {digest_before} became "
                           f"{digest_after}; its results cannot be compared")  # fmt: skip
    attempt.check_newest()
    save_adapter(trainer, output / "adapter", digest_before)
    # Over all attempts: one that goes on from the last checkpoint has logged little itself, or nothing.
    points = [metrics for _, metrics in read_points(attempt.folder.parent)]
    last = [point[LOSS] for point in points][-max(1, len(points) // SHARE_OF_FINAL_LOSS) :]
    return {
        "adapter": str(output / "adapter"),
        "base_weights_sha256": digest_before,
        "final_loss": statistics.mean(last),
        "tokens_per_s_per_gpu": statistics.median(point[SPEED] for point in points),
        "total_steps": plan.total_steps,
        "world_size": world_size,
        "trainable_parameters": trainable,
        "precision": precision_of(settings),
        "peak_memory_gbytes": peak_memory_gbytes(),
    }


def build_trainer(
    attempt: Attempt,
    settings: TrainingSettings,
    plan: TrainingPlan,
    model_folder: Path,
    rows: Dataset,
    longest_tokens: int,
    checkpoints: Path,
) -> SFTTrainer:
    """TRL's trainer for the plan, with everything that bites by default set on purpose."""
    quiet_loading()
    precision = precision_of(settings)
    is_cpu = device().type == "cpu"
    model = load_model(model_folder, precision)
    config = SFTConfig(
        output_dir=str(checkpoints),
        max_steps=plan.total_steps,
        per_device_train_batch_size=plan.per_device_batch_size,
        gradient_accumulation_steps=plan.accumulation_steps,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type=settings.lr_scheduler,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=settings.gradient_checkpointing,
        average_tokens_across_devices=True,
        bf16=precision != "float32",
        use_cpu=is_cpu,
        seed=settings.seed,
        # The rows come in the order of their steps, all epochs after one another.
        train_sampling_strategy="sequential",
        logging_steps=settings.log_every_steps,
        logging_first_step=True,
        save_steps=settings.save_every_steps,
        save_total_limit=2,
        include_num_input_tokens_seen="non_padding",
        # Rows are tokenised, masked and length-checked by the dataset stage: nothing may touch them here.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        # Torch on a CPU compiles and keeps a product for every shape it meets: fewer lengths, fewer products. Padding to
        # 32 made a step 8 % faster and took 0.6 GB less per rank than the conversations' own lengths.
        pad_to_multiple_of=32 if is_cpu else "auto",
        dataloader_drop_last=True,
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=True,
    )
    if is_cpu and longest_tokens <= EAGER_ATTENTION_TOKENS:
        model.set_attn_implementation("eager")
    trainer = (AnswerOnlyTrainer if is_cpu else SFTTrainer)(
        model=model,
        args=config,
        train_dataset=rows,
        processing_class=load_tokenizer(model_folder),
        peft_config=lora_config(settings.lora, model),
        callbacks=[Reporter(attempt, plan), MarkComplete(attempt)],
    )
    # The reporter prints a line that a person can read.
    trainer.remove_callback(PrinterCallback)
    return trainer


def precision_of(settings: TrainingSettings) -> Resolved:
    """The precision that training has on this rank's device.

    On a CPU embedding, norms and with them the residual stream stay in float32, which costs a twentieth of the speed.
    """
    return resolve_precision(settings.precision, on_cpu="mixed")


def lora_config(lora: LoraSettings, model: PreTrainedModel) -> LoraConfig:
    """PEFT's configuration of the adapter.

    Raises:
        ValueError: the model has no layer ``first_layer``.
    """
    layers = model.config.get_text_config().num_hidden_layers
    if lora.first_layer >= layers:
        raise ValueError(
            f"training.lora.first_layer={lora.first_layer}, but the model's {layers} layers end at {layers - 1}"
        )
    target: str | list[str]
    if isinstance(lora.target_modules, tuple):
        target = list(lora.target_modules)
    elif lora.first_layer:
        # PEFT takes its own "all-linear" together with all layers only.
        head = model.get_output_embeddings()
        linear = (
            name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and part is not head
        )
        target = sorted({name.rpartition(".")[2] for name in linear})
    else:
        target = lora.target_modules
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=target,
        layers_to_transform=list(range(lora.first_layer, layers)) if lora.first_layer else None,
        task_type="CAUSAL_LM",
    )


def load_rows(path: Path, settings: TrainingSettings) -> Dataset:
    """The tokenised conversations, mapped into memory: ``input_ids`` and ``labels`` (-100 outside the answer)."""
    rows = Dataset.from_file(str(path))
    return shuffled_answers(rows, settings.seed) if settings.shuffle_answers else rows


def num_tokens(rows: Dataset) -> list[int]:
    """The length of each conversation, counted without unpacking it."""
    lengths: list[int] = pc.list_value_length(rows.with_format("arrow")[:]["input_ids"]).to_pylist()
    return lengths


def shuffled_answers(rows: Dataset, seed: int) -> Dataset:
    """The control experiment: every request with the answer to some other request."""
    pieces = [_pieces(row["input_ids"], row["labels"]) for row in rows]
    answers = [ids for conversation in pieces for ids, is_answer in conversation if is_answer]
    swapped = iter([answers[i] for i in permutation(len(answers), seed)])
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for conversation in pieces:
        ids: list[int] = []
        labels: list[int] = []
        for piece, is_answer in conversation:
            taught = next(swapped) if is_answer else piece
            ids += taught
            labels += taught if is_answer else [IGNORED] * len(taught)
        columns["input_ids"].append(ids)
        columns["labels"].append(labels)
    return Dataset.from_dict(columns)


def _pieces(ids: list[int], labels: list[int]) -> list[tuple[list[int], bool]]:
    """A tokenised conversation as alternating stretches, each with whether it is an answer."""
    grouped = itertools.groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    return [([i for i, _ in pairs], is_answer) for is_answer, pairs in grouped]


def save_adapter(trainer: SFTTrainer, final: Path, base_digest: str) -> None:
    """Write the adapter as safetensors with the digest of its base, whole or not at all."""
    temporary = final.with_name(".adapter.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(final, ignore_errors=True)
    trainer.model.save_pretrained(temporary, safe_serialization=True)
    write_json(temporary / "manifest.json", {"base_weights_sha256": base_digest})
    publish_folder(temporary, final)


def peak_memory_gbytes() -> float:
    """Most memory this rank has held, in GB (10^9 bytes): of its GPU, or of the process where there is none."""
    if device().type == "cuda":
        return float(torch.cuda.max_memory_allocated()) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
