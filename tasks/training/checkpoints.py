"""Which checkpoint is whole: the trainer's own folders are not atomic, so a manifest with digests is written last."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks.contracts.attempt import Attempt
from tasks.contracts.files import digest_of_files, read_json, sync_tree, write_json, write_text

MANIFEST = "manifest.json"


def newest_valid(checkpoints: Path) -> Path | None:
    """The newest checkpoint whose files are what its manifest says, or None."""
    folders = sorted(checkpoints.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
    for folder in folders:
        if not (folder / MANIFEST).exists():
            print(f"checkpoint {folder.name} was never finished; looking for an older one")
        elif read_json(folder / MANIFEST)["digest"] != _digest(folder):
            print(f"checkpoint {folder.name} is damaged (digest differs); looking for an older one")
        else:
            return folder
    return None


def _digest(folder: Path) -> str:
    return digest_of_files((p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST), folder)


class MarkComplete(TrainerCallback):
    """Writes the manifest of each checkpoint once its files are durable, and points ``LATEST`` at it."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Every rank has a file of its own in the folder, and the trainer does not wait for them.
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if not state.is_world_process_zero:
            return
        self._attempt.check_newest()
        checkpoints = Path(str(args.output_dir))
        folder = checkpoints / f"checkpoint-{state.global_step}"
        sync_tree(folder)
        write_json(folder / MANIFEST, {"step": state.global_step, "digest": _digest(folder)})
        write_text(checkpoints / "LATEST", folder.name)
