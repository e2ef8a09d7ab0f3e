"""How the ranks begin: rank 0 looks whether this run can be, all others go on with it or not at all."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.contracts.files import digest_of_files, read_json
from tasks.contracts.settings import TrainingSettings
from tasks.models.fp8_base import DIVISOR, MIN_CAPABILITY, share_in_fp8, why_not
from tasks.models.load import device
from tasks.models.packed_attention import implementation, register
from tasks.training.adapter import lora_config
from tasks.training.build import is_packed, precision_of
from tasks.training.checkpoints import MANIFEST, folder_of, newest_valid
from tasks.training.plan import FREE_SETTINGS, LATER_SETTINGS, TrainingPlan, plan_training
from tasks.training.ranks import Ranks
from tasks.training.stop_request import leave_silently
from tasks.training.zero3_trainer import is_installed

NO_CHECKPOINT = -1
MIN_SHARE_IN_FP8 = 0.5


class CheckpointNotSeen(RuntimeError):
    """A rank does not see the checkpoint that rank 0 chose."""


def on_rank_0(ranks: Ranks, look: Callable[[], list[int]], *, num_values: int) -> list[int]:
    """What rank 0 found, on every rank; where it raises, its error alone is told and all ranks end."""
    values, error = [0] * (1 + num_values), None
    if ranks.rank == 0:
        try:
            values = [1, *look()]
        except Exception as caught:
            error = caught
    is_well, *found = ranks.from_rank_0(values)
    if not is_well:
        if error is not None:
            raise error
        leave_silently()
    return found


def ranks_without_fp8(ranks: Ranks) -> list[int]:
    """Those whose GPU multiplies nothing in FP8: nodes of one job may have other chips."""
    rows = ranks.gather([int(why_not(device()) is not None)]).wait()
    return [rank for rank, row in enumerate(rows) if row[0]]


def check_inputs(
    settings: TrainingSettings,
    model_folder: Path,
    lengths: Sequence[int],
    world_size: int,
    *,
    without_fp8: Sequence[int] = (),
) -> TrainingPlan:
    """The plan of a run that can be trained; takes seconds, before any weights are loaded.

    Args:
        without_fp8: ranks whose GPUs have no FP8 products; asked where ``fp8_base`` is set.

    Raises:
        ValueError: listing everything that is wrong, each with value, limit and what to do.
    """
    problems: list[str] = []
    plan: TrainingPlan | None = None
    try:
        plan = plan_training(settings, num_rows=len(lengths), world_size=world_size)
    except ValueError as error:
        problems.append(str(error))
    if settings.strategy == "zero3" and not is_installed():
        problems.append(
            "training.strategy=zero3 needs DeepSpeed on every node, which this one has not: "
            "python -m pip install -c constraints.txt -e '.[train,zero3]', or set training.strategy=fsdp"
        )
    if settings.fp8_base:
        if without_fp8:
            why = (
                why_not(device()) or f"their GPUs have a compute capability below {'.'.join(map(str, MIN_CAPABILITY))}"
            )
            problems.append(
                f"training.fp8_base=true: not on rank {', '.join(map(str, without_fp8))}: {why}; set training.fp8_base=false"
            )
        # On a processor that multiplies bfloat16 slowly `auto` is float32.
        if (precision := precision_of(settings)) != "bfloat16":
            problems.append(
                f"training.fp8_base=true: training.precision={settings.precision} is {precision} here; "
                "set training.precision=bfloat16"
            )
    config = AutoConfig.from_pretrained(model_folder)
    # Modules without weights: enough to know their names and sizes.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if settings.fp8_base and (share := share_in_fp8(model.get_decoder())) < MIN_SHARE_IN_FP8:
        problems.append(
            f"training.fp8_base=true: {share:.0%} of the decoder's parameters are linear layers whose sides {DIVISOR} divides, "
            f"the only ones that are multiplied in FP8, and less than {MIN_SHARE_IN_FP8:.0%} is not worth it; set it to false"
        )
    problems += not_kept_apart(settings, model, max(lengths, default=0))
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and lengths and max(lengths) > positions:
        longer = sum(length > positions for length in lengths)
        problems.append(
            f"{longer} of {len(lengths)} training rows are longer than the {positions} positions of the model in "
            f"{model_folder}, the longest has {max(lengths)} tokens; set dataset.max_length_tokens={positions} or less"
        )
    try:
        lora_config(settings.lora, model)
    except ValueError as error:
        problems.append(str(error))
    if problems or plan is None:
        raise ValueError("\n".join(problems))
    return plan


def not_kept_apart(settings: TrainingSettings, model: Any, longest: int) -> list[str]:
    """Why conversations that lie end to end would not be read as the model would read each, as far as that shows without weights.

    Args:
        model: gets the attention that it would be trained with.
        longest: tokens of the longest conversation.
    """
    if not is_packed(settings):
        return [] if settings.attention == "varlen" else [
            f"training.attention=flex is for GPUs in bfloat16, where conversations lie end to end; this is {device().type} in "
            f"{precision_of(settings)}; set training.attention=varlen"
        ]  # fmt: skip
    told = f"training.attention={settings.attention}"
    padded = "training.precision=float32 with training.attention=varlen, in which each conversation is padded"
    register()
    wanted = implementation(settings.attention)
    try:
        model.set_attn_implementation(wanted)
    except ValueError as error:
        return [f"{told}: {error}"]
    # Some are told, and keep their own.
    if model.config._attn_implementation != wanted:
        return [
            f"{told}: {type(model).__name__} takes no attention but its own, which would let conversations that lie end to end "
            f"see each other; set {padded}"
        ]
    if settings.attention == "varlen" and (beyond := beyond_varlen(model.config.get_text_config(), longest)):
        return [f"{told}: the model has {beyond}, which it would leave out; set training.attention=flex, or {padded}"]
    return []


def beyond_varlen(config: Any, longest: int) -> str | None:
    """What the model's layers do with their scores that torch's variable-length kernels do not; None: nothing.

    Args:
        longest: tokens of the longest conversation; a window that holds it is none.
    """
    kinds = getattr(config, "layer_types", None)
    for name, kind in (("sliding_window", "sliding_attention"), ("attention_chunk_size", "chunked_attention")):
        size = getattr(config, name, None)
        if size is not None and size < longest and (kinds is None or kind in kinds):
            return f"{name}={size} tokens, and the longest row has {longest}"
    cap = getattr(config, "attn_logit_softcapping", None)
    return None if cap is None else f"attn_logit_softcapping={cap}"


def binding_of(
    settings: TrainingSettings, plan: TrainingPlan, *, base_digest: str, rows_file: Path
) -> Mapping[str, Any]:
    """What makes an experiment what it is; a checkpoint is gone on from only where all of it is the same."""
    learnt = settings.model_dump(mode="json", exclude=set(FREE_SETTINGS))
    for name, before in LATER_SETTINGS.items():
        if learnt[name] == before:
            del learnt[name]
    return {f"training.{name}": value for name, value in learnt.items()} | {
        "base_weights_sha256": base_digest,
        "training_rows_sha256": digest_of_files([rows_file], rows_file.parent),
        "total_steps": plan.total_steps,
    }


def agree_on_checkpoint(
    ranks: Ranks, checkpoints: Path, binding: Mapping[str, Any], *, say: Callable[[str], None]
) -> int | None:
    """The step of the newest whole checkpoint, the same on all ranks; None to begin at the beginning.

    Args:
        binding: rank 0's; the others do not read the files that it is made of.

    Raises:
        ForeignCheckpoint: on rank 0; the others leave.
        CheckpointNotSeen: on a rank whose storage shows something else than rank 0's.
    """

    def look() -> list[int]:
        found = newest_valid(checkpoints, binding, say=say)
        return [NO_CHECKPOINT, 0] if found is None else [found[0], _short_digest(folder_of(checkpoints, found[0]))]

    step, digest = on_rank_0(ranks, look, num_values=2)
    if step == NO_CHECKPOINT:
        return None
    folder = folder_of(checkpoints, step)
    try:
        seen = _short_digest(folder)
    except OSError as error:
        raise CheckpointNotSeen(_not_seen(ranks, folder, str(error))) from error
    if seen != digest:
        raise CheckpointNotSeen(_not_seen(ranks, folder, f"its {MANIFEST} is another one"))
    return step


def _short_digest(folder: Path) -> int:
    return int(read_json(folder / MANIFEST)["sha256"][:15], 16)


def _not_seen(ranks: Ranks, folder: Path, why: str) -> str:
    return (
        f"rank {ranks.rank} does not see the checkpoint {folder} as rank 0 does ({why}); storage.shared must be one "
        "folder, the same on all nodes"
    )
