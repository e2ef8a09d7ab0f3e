"""TRL's trainer for a plan, with everything that bites by default set on purpose."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from tasks.contracts.settings import TrainingSettings
from tasks.models.fp8_base import checksum, convert
from tasks.models.load import Resolved, device, load_model, load_tokenizer, quiet_loading, resolve_precision
from tasks.models.packed_attention import implementation, register
from tasks.training.adapter import lora_config
from tasks.training.answer_only_loss import AnswerOnlyTrainer
from tasks.training.elastic import Elastic
from tasks.training.packed_trainer import PackedTrainer
from tasks.training.plan import TrainingPlan
from tasks.training.ranks import START_LIMIT_S
from tasks.training.sharded import Sharded
from tasks.training.zero3_trainer import Zero3Trainer, join_deepspeed


class _OnGpu(Elastic, PackedTrainer):
    """Conversations end to end."""


class _OnGpuExactly(Elastic, SFTTrainer):
    """TRL's own loss and padding: packed attention has no kernel for float32."""


class _OnCpu(Elastic, AnswerOnlyTrainer):
    """The loss that is cheap without Triton."""


class _ShardedOnGpu(Elastic, Sharded, PackedTrainer):
    """The base in shards, conversations end to end."""


class _ShardedExactly(Elastic, Sharded, AnswerOnlyTrainer):
    """The base in shards, on a processor or in float32."""


class _Zero3(Zero3Trainer, AnswerOnlyTrainer):
    """Everything in shards, on whatever device."""


def build_trainer(
    settings: TrainingSettings,
    plan: TrainingPlan,
    model_folder: Path,
    rows: Dataset,
    output: Path,
    *,
    callbacks: Sequence[Any],
    **elastic: Any,
) -> Elastic:
    """The trainer of this rank.

    Args:
        rows: in the order of their steps, with the column ``row``.
        elastic: what :class:`Elastic` takes.
    """
    quiet_loading()
    precision = precision_of(settings)
    is_cpu = device().type == "cpu"
    packed = is_packed(settings)
    # One rank alone has nothing to share.
    is_sharded = settings.strategy == "fsdp" and plan.world_size > 1
    is_zero3 = settings.strategy == "zero3" and plan.world_size > 1
    config = SFTConfig(
        output_dir=str(output),
        max_steps=plan.total_steps,
        per_device_train_batch_size=plan.per_device_batch_size,
        gradient_accumulation_steps=plan.accumulation_steps,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type=settings.lr_scheduler,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        activation_checkpointing=bool(settings.gradient_checkpointing),
        activation_checkpointing_kwargs={"every_n_layers": int(settings.gradient_checkpointing or 1)},
        average_tokens_across_devices=True,
        bf16=precision != "float32",
        use_cpu=is_cpu,
        seed=settings.seed,
        # The rows come in the order of their steps, all epochs after one another.
        train_sampling_strategy="sequential",
        logging_steps=settings.log_every_steps,
        logging_first_step=True,
        # A loss that is no number ends the run; the filter would hide it, and wait for the GPU at every micro-batch.
        logging_nan_inf_filter=False,
        save_steps=settings.save_every_steps,
        # Rows are tokenised, masked and length-checked by the dataset stage: nothing may touch them here.
        dataset_kwargs={"skip_prepare_dataset": True},
        # Our collator takes the rows' numbers out of the batch again.
        remove_unused_columns=False,
        max_length=None,
        # Torch on a CPU compiles and keeps a product for every shape it meets: fewer lengths, fewer products. Padding to
        # 32 made a step 8 % faster and took 0.6 GB less per rank than the conversations' own lengths.
        pad_to_multiple_of=32 if is_cpu else None,
        padding_free=packed,
        dataloader_drop_last=True,
        ddp_find_unused_parameters=False,
        # They do not change: rotary frequencies, and the base in FP8, which gloo cannot send.
        ddp_broadcast_buffers=False,
        # Rows go to the GPU without waiting for what it has been given to do before, at every step otherwise; and the state
        # that DeepSpeed was joined with stays.
        accelerator_config={"non_blocking": not is_cpu, "use_configured_state": is_zero3},
        ddp_timeout=int(max(2 * settings.collective_timeout_minutes * 60, START_LIMIT_S)),
        report_to="none",
        # Of the base in shards transformers could save nothing else; our checkpoints do not go through it.
        save_only_model=is_sharded,
        disable_tqdm=True,
        **(join_deepspeed() if is_zero3 else {}),
    )
    # After DeepSpeed's configuration, by which transformers loads the weights in parts.
    model = load_model(model_folder, precision, num_shards=plan.world_size if is_sharded else 1)
    if packed:
        register()
        model.set_attn_implementation(implementation(settings.attention))
    kind: Any
    if is_zero3:
        kind = _Zero3
    elif is_sharded:
        kind = _ShardedOnGpu if packed else _ShardedExactly
    else:
        kind = _OnGpu if packed else _OnCpu if is_cpu else _OnGpuExactly
    trainer: Elastic = kind(
        model=model,
        args=config,
        train_dataset=rows,
        processing_class=load_tokenizer(model_folder),
        peft_config=lora_config(settings.lora, model),
        callbacks=list(callbacks),
        **elastic,
    )
    if is_zero3 and packed and trainer.ranks.rank == 0:
        trainer.say(
            "with strategy=zero3 nobody looks whether this model keeps conversations that lie end to end apart; ddp and fsdp do"
        )
    if settings.fp8_base:
        decoder = trainer.model.get_base_model().get_decoder()
        converted = convert(decoder)
        _check_same_base(trainer, checksum(decoder))
        if trainer.ranks.rank == 0:
            trainer.say(f"fp8_base: {converted} frozen matrices of the decoder are multiplied in FP8")
    elif isinstance(trainer, PackedTrainer) and (joined := trainer.join_adapters()) and trainer.ranks.rank == 0:
        trainer.say(
            f"adapters of {joined.num_layers} layers are multiplied together with their matrices, "
            f"in {joined.num_products} products"
        )
    # The reporter prints a line that a person can read.
    trainer.remove_callback(PrinterCallback)
    return trainer


def _check_same_base(trainer: Elastic, own: int) -> None:
    """DDP puts parameters in step at the start, and leaves out the buffers that a base in FP8 is."""
    sums = [row[0] for row in trainer.ranks.gather([own]).wait()]
    if other := [rank for rank, found in enumerate(sums) if found != sums[0]]:
        raise ValueError(
            f"ranks {other} read another base model than rank 0; model.name must be the same files on every node"
        )


def is_packed(settings: TrainingSettings) -> bool:
    """Whether conversations lie end to end on this rank's device, without padding."""
    return device().type != "cpu" and precision_of(settings) == "bfloat16"


def precision_of(settings: TrainingSettings) -> Resolved:
    """The precision that training has on this rank's device.

    On a CPU embedding, norms and with them the residual stream stay in float32, which costs a twentieth of the speed.
    """
    return resolve_precision(settings.precision, on_cpu="mixed" if settings.strategy == "ddp" else "float32")


def recomputed_one_in(config: SFTConfig) -> int:
    """Of one layer in so many activations are recomputed; 0: of none."""
    return config.activation_checkpointing_kwargs["every_n_layers"] if config.activation_checkpointing else 0
