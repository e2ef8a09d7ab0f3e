"""How many steps a training run takes, and whether such a run can teach; known before anything is submitted."""

from dataclasses import dataclass

from tasks.contracts.settings import TrainingSettings

FREE_SETTINGS = frozenset(
    {
        "per_device_batch_size",
        "gradient_checkpointing",
        "save_every_steps",
        "keep_checkpoints",
        "log_every_steps",
        "collective_timeout_minutes",
        "merge_adapter",
        "strategy",
        "attention",
    }
)
"""Training settings that change how fast or in how much memory, and nothing that is learnt: a run may go on with others."""
LATER_SETTINGS = {"fp8_base": False}
"""Training settings that are younger than checkpoints which may be gone on from, and what was done before there were any."""
MAX_WARMUP_SHARE = 0.2
"""A run that spends a fifth of its steps or more warming up has a wrong batch size or warm-up for its rows."""


@dataclass(frozen=True)
class TrainingPlan:
    """What the settings come to on a number of rows and ranks."""

    world_size: int
    per_device_batch_size: int
    accumulation_steps: int
    steps_per_epoch: int
    total_steps: int


def plan_training(settings: TrainingSettings, *, num_rows: int, world_size: int) -> TrainingPlan:
    """The plan of a run on ``num_rows`` conversations and ``world_size`` ranks.

    Raises:
        ValueError: listing everything that keeps such a run from teaching, each with what would do.
    """
    problems: list[str] = []
    # Chosen by memory, the share divides whatever each rank has.
    batch = settings.global_batch_size
    share = 1 if settings.per_device_batch_size == "auto" else settings.per_device_batch_size
    # A batch smaller than all ranks together is met by giving each rank fewer; never by changing the batch.
    if batch % world_size:
        near = sorted({max(1, batch // world_size) * world_size, (batch // world_size + 1) * world_size})
        problems.append(
            f"training.global_batch_size={batch} is not a multiple of {world_size} ranks; use "
            + " or ".join(map(str, near))
        )
    elif (batch // world_size) % share:
        per_rank = batch // world_size
        fitting = [size for size in range(1, per_rank + 1) if per_rank % size == 0]
        problems.append(
            f"training.per_device_batch_size={share} does not divide the {per_rank} conversations that each of "
            f"{world_size} ranks has of training.global_batch_size={batch}; use one of {', '.join(map(str, fitting))}"
        )
    if num_rows < batch:
        problems.append(
            f"{num_rows} training rows do not fill one global batch of {batch}; lower training.global_batch_size"
        )
    if problems:
        raise ValueError("\n".join(problems))

    steps_per_epoch = num_rows // batch
    if settings.max_steps_per_epoch is not None:
        steps_per_epoch = min(steps_per_epoch, settings.max_steps_per_epoch)
    total = steps_per_epoch * settings.num_epochs
    run = (
        f"{num_rows} rows in batches of {batch} for {settings.num_epochs} epochs are {total} steps"
        + f" (at most {settings.max_steps_per_epoch} an epoch)" * (settings.max_steps_per_epoch is not None)
    )
    if settings.warmup_steps >= MAX_WARMUP_SHARE * total:
        fitting_warmup = max(0, int(MAX_WARMUP_SHARE * total / 2))
        problems.append(
            f"training.warmup_steps={settings.warmup_steps} is {settings.warmup_steps / total:.0%} of the run: {run}; "
            f"use at most {fitting_warmup} (half of {MAX_WARMUP_SHARE:.0%}), a smaller global batch or more rows"
        )
    if total < settings.log_every_steps:
        problems.append(f"training.log_every_steps={settings.log_every_steps} would log nothing: {run}")
    if total < settings.save_every_steps:
        problems.append(
            f"training.save_every_steps={settings.save_every_steps} would save no checkpoint: {run}; "
            f"use {max(1, total // 2)}"
        )
    if problems:
        raise ValueError("\n".join(problems))
    return TrainingPlan(world_size, share, batch // (world_size * share), steps_per_epoch, total)
