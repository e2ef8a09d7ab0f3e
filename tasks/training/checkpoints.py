"""Checkpoints that are whole or absent, and that any number of ranks can load.

::

    checkpoints/step-000300/adapter/              as PEFT saves it: PeftModel.from_pretrained loads it
                            optimizer.safetensors AdamW's moments, by the parameters' names
                            state.json            scheduler, data position, random numbers, loss since the last point
                            trainer_state.json    transformers' TrainerState: step, tokens seen, loss curve
                            manifest.json         what every file must be, written last inside the folder
                LATEST                            the newest whole checkpoint's name, written after all of it

Nothing in them depends on the number of ranks, and nothing is a pickle.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tasks.contracts.files import digest_of, read_json, sync_folder, sync_tree, write_json, write_text

MANIFEST, LATEST = "manifest.json", "LATEST"
ADAPTER = "adapter"
ADAPTER_WEIGHTS = f"{ADAPTER}/adapter_model.safetensors"
ADAPTER_CONFIG = f"{ADAPTER}/adapter_config.json"
OPTIMIZER, STATE, TRAINER_STATE = "optimizer.safetensors", "state.json", "trainer_state.json"
FORMAT = 1
SPARE_BYTES = 16 << 20
"""Left free on the disk beyond a checkpoint: logs and metrics of the run need room as well."""


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are not what its manifest says."""


class ForeignCheckpoint(ValueError):
    """A checkpoint of another experiment: going on from it would mix two trainings."""


@dataclass(frozen=True)
class Snapshot:
    """The state of training after ``step`` optimiser steps, in memory that training no longer touches.

    Attributes:
        adapter, optimizer: tensors on the CPU, by name.
        texts: the JSON files, by their path in the checkpoint.
        loss: mean of the logged losses since the checkpoint before, in nats per token; None: nothing was logged.
    """

    step: int
    adapter: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    texts: Mapping[str, str]
    loss: float | None

    @property
    def num_bytes(self) -> int:
        """What its tensors take."""
        return sum(t.numel() * t.element_size() for part in (self.adapter, self.optimizer) for t in part.values())


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoints / f"step-{step:06d}"


def steps_of(checkpoints: Path) -> list[int]:
    """The steps that have a folder, whole or not, newest first."""
    found = (re.fullmatch(r"step-(\d{6,})", path.name) for path in checkpoints.glob("step-*"))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def write_checkpoint(
    checkpoints: Path,
    snapshot: Snapshot,
    *,
    binding: Mapping[str, Any],
    world_size: int,
    before_commit: Callable[[], None],
) -> Path:
    """Write a checkpoint: a temporary folder, digests, fsync, rename, and ``LATEST`` last.

    Args:
        binding: what makes the experiment what it is; only a run with the same goes on from here.
        before_commit: called before either rename; raises if this attempt may no longer write.

    Raises:
        OSError: the disk is full or fails; nothing of this checkpoint is left.
        DamagedCheckpoint: a value in it is not finite; it is not written.
    """
    for part in (snapshot.adapter, snapshot.optimizer):
        if bad := [name for name, tensor in part.items() if not torch.isfinite(tensor).all()]:
            raise DamagedCheckpoint(f"step {snapshot.step}: {bad[0]} and {len(bad) - 1} more hold values not finite")
    _check_space(checkpoints, snapshot.num_bytes)
    final = folder_of(checkpoints, snapshot.step)
    # A name of its own: a rank that outlived its attempt does not write into its successor's folder.
    temporary = checkpoints / f".{final.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        (temporary / ADAPTER).mkdir(parents=True)
        _save(snapshot.adapter, temporary / ADAPTER_WEIGHTS)
        _save(snapshot.optimizer, temporary / OPTIMIZER)
        for name, text in snapshot.texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        manifest = {
            "format": FORMAT,
            "step": snapshot.step,
            "world_size": world_size,
            "written": time.time(),
            "loss": snapshot.loss,
            "experiment": dict(binding),
            "files": {name: _measured(temporary / name) for name in _files(temporary)},
        }
        sync_tree(temporary)
        write_json(temporary / MANIFEST, manifest | {"sha256": digest_of(manifest)})
        before_commit()
        if final.exists():
            # A damaged one, which this attempt passed over when it started.
            _remove(final)
        temporary.rename(final)
        sync_folder(checkpoints)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    before_commit()
    write_text(checkpoints / LATEST, final.name)
    return final


def validate(folder: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint.

    Raises:
        DamagedCheckpoint: naming the file, what it should be and what it is.
        OSError: the storage cannot be read now, which says nothing about the checkpoint.
    """
    try:
        manifest: dict[str, Any] = read_json(folder / MANIFEST)
        recorded, files = manifest.pop("sha256"), manifest["files"]
        if digest_of(manifest) != recorded:
            raise DamagedCheckpoint(f"{MANIFEST} is damaged (its digest differs)")
        if manifest["format"] != FORMAT:
            raise DamagedCheckpoint(f"its format is {manifest['format']}, this program reads {FORMAT}")
        if missing := sorted(files.keys() - set(_files(folder))):
            raise DamagedCheckpoint(f"{missing[0]} is missing")
        for name, expected in files.items():
            found = _measured(folder / name)
            if found["bytes"] != expected["bytes"]:
                raise DamagedCheckpoint(f"{name} has {found['bytes']} bytes instead of {expected['bytes']}")
            if found["sha256"] != expected["sha256"]:
                raise DamagedCheckpoint(f"{name} is damaged (its digest differs)")
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{error.filename} is missing: it was never finished") from error
    except DamagedCheckpoint:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # Not JSON, or JSON of another shape.
        raise DamagedCheckpoint(f"{MANIFEST} cannot be read: {type(error).__name__}: {error}") from error
    return manifest


def newest_valid(
    checkpoints: Path, binding: Mapping[str, Any], *, say: Callable[[str], None] = print
) -> tuple[int, dict[str, Any]] | None:
    """Step and manifest of the newest whole checkpoint, or None; what is damaged is told and passed over.

    Raises:
        ForeignCheckpoint: it is of an experiment with other settings, weights or rows; all differences are listed.
        OSError: the storage cannot be read: beginning anew for that would throw a good checkpoint away.
    """
    for step in steps_of(checkpoints):
        folder = folder_of(checkpoints, step)
        try:
            manifest = validate(folder)
        except DamagedCheckpoint as error:
            say(f"checkpoint {folder.name}: {error}; looking for an older one")
            continue
        theirs = manifest["experiment"]
        differing = sorted(
            name for name in theirs.keys() | binding.keys() if theirs.get(name) != _as_json(binding.get(name))
        )
        if differing:
            raise ForeignCheckpoint(
                f"{folder} is a checkpoint of another experiment and cannot be gone on from:\n"
                + "\n".join(f"  {name}: {theirs.get(name)} there, {binding.get(name)} now" for name in differing)
                + "\nGive the values it was made with, or another --run to start anew"
            )
        return step, manifest
    return None


def clear_after(checkpoints: Path, step: int) -> None:
    """Remove what is newer than the checkpoint that training goes on from, and what dead attempts left unfinished."""
    for newer in steps_of(checkpoints):
        if newer > step:
            _remove(folder_of(checkpoints, newer))
    for left in [*checkpoints.glob(".step-*.tmp"), *checkpoints.glob(".step-*.removed")]:
        shutil.rmtree(left, ignore_errors=True)


def prune(checkpoints: Path, keep: int) -> None:
    """Keep the newest ``keep`` checkpoints and the one with the lowest loss; remove the others."""
    steps = steps_of(checkpoints)
    losses = {step: loss for step in steps if (loss := _loss(folder_of(checkpoints, step))) is not None}
    best = min(losses, key=lambda step: (losses[step], -step)) if losses else None
    for step in steps[keep:]:
        if step != best:
            _remove(folder_of(checkpoints, step))


def is_full_disk(error: OSError) -> bool:
    """Whether an error means that no room or no quota is left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _check_space(checkpoints: Path, num_bytes: int) -> None:
    checkpoints.mkdir(parents=True, exist_ok=True)
    # Before the first byte: a disk that this checkpoint fills would also lose the lines that others log meanwhile.
    free = shutil.disk_usage(checkpoints).free
    if free < num_bytes + SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"No space left on device: {free / 1e6:.0f} MB are free and a checkpoint needs "
            f"{(num_bytes + SPARE_BYTES) / 1e6:.0f} MB",
            str(checkpoints),
        )


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        # What the disk said is inside its text only.
        raise OSError(errno.EIO, str(error), str(path)) from error


def _loss(folder: Path) -> float | None:
    """The loss that a manifest tells; one that cannot be read is none to be kept for."""
    try:
        loss: float | None = read_json(folder / MANIFEST)["loss"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return loss


def _measured(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def _files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            yield str(path.relative_to(folder))


def _remove(folder: Path) -> None:
    # Out of sight at once: a process killed half-way leaves nothing that looks like a checkpoint.
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
