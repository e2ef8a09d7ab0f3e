"""Checkpoints on the disk: whole, of this experiment, of this attempt, or not used."""

import errno
import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tasks.contracts.attempt import Attempt, StaleAttempt
from tasks.training.checkpoint_writer import CheckpointWriter
from tasks.training.checkpoints import (
    LATEST,
    DamagedCheckpoint,
    ForeignCheckpoint,
    Snapshot,
    clear_after,
    folder_of,
    newest_valid,
    prune,
    steps_of,
    validate,
    write_checkpoint,
)

BINDING = {"training.learning_rate": 0.1, "base_weights_sha256": "abc"}


def snapshot(step: int, loss: float | None = None) -> Snapshot:
    values = torch.arange(64.0) + step
    texts = {"state.json": json.dumps({"step": step}), "adapter/adapter_config.json": "{}"}
    return Snapshot(step, {"a.weight": values}, {"exp_avg/a.weight": values / 2}, texts, loss)


def write(checkpoints: Path, step: int, loss: float | None = None, before_commit=lambda: None) -> Path:
    return write_checkpoint(
        checkpoints, snapshot(step, loss), binding=BINDING, world_size=2, before_commit=before_commit
    )


@pytest.fixture
def attempt(tmp_path) -> Attempt:
    (tmp_path / "job" / "001").mkdir(parents=True)
    (tmp_path / "job" / "NEWEST").write_text("001")
    return Attempt(tmp_path / "job" / "001")


def writer_of(attempt: Attempt, checkpoints: Path, said: list[str], keep: int = 2) -> CheckpointWriter:
    return CheckpointWriter(checkpoints, attempt, BINDING, 2, keep, lambda step: None, said.append)


def test_a_checkpoint_holds_what_was_written_and_latest_names_it(tmp_path):
    write(tmp_path, 5)
    folder = write(tmp_path, 10)
    assert (tmp_path / LATEST).read_text() == "step-000010" == folder.name
    step, manifest = newest_valid(tmp_path, BINDING)
    assert (step, manifest["step"], manifest["world_size"]) == (10, 10, 2)
    assert torch.equal(load_file(folder / "adapter" / "adapter_model.safetensors")["a.weight"], torch.arange(64.0) + 10)
    assert not list(tmp_path.glob(".*"))


def flipped(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncated(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def removed(path: Path, draw: random.Random) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flipped, truncated, removed])
def test_damage_anywhere_in_a_checkpoint_is_found_and_the_one_before_is_used(tmp_path, damage):
    draw = random.Random(3)
    write(tmp_path, 5)
    whole = write(tmp_path, 10)
    kept = tmp_path / "kept"
    shutil.copytree(whole, kept)
    files = sorted(path.relative_to(kept) for path in kept.rglob("*") if path.is_file())
    assert len(files) == 5
    for attempt in range(100):
        damage(whole / files[attempt % len(files)], draw)
        said: list[str] = []
        found = newest_valid(tmp_path, BINDING, say=said.append)
        assert found is not None
        assert found[0] == 5, f"{damage.__name__} of {files[attempt % len(files)]} was not found"
        assert "step-000010" in said[0]
        shutil.rmtree(whole)
        shutil.copytree(kept, whole)
    assert newest_valid(tmp_path, BINDING)[0] == 10


def test_nothing_is_found_where_everything_is_damaged_or_unfinished(tmp_path):
    truncated(write(tmp_path, 5) / "state.json", random.Random(1))
    (tmp_path / "step-000010").mkdir()
    said: list[str] = []
    assert newest_valid(tmp_path, BINDING, say=said.append) is None
    assert "was never finished" in said[0]
    assert "state.json has" in said[1]


def test_a_checkpoint_of_another_experiment_is_refused_with_every_difference(tmp_path):
    write(tmp_path, 5)
    with pytest.raises(ForeignCheckpoint) as caught:
        newest_valid(tmp_path, {"training.learning_rate": 0.2, "base_weights_sha256": "xyz"})
    assert "training.learning_rate: 0.1 there, 0.2 now" in str(caught.value)
    assert "base_weights_sha256: abc there, xyz now" in str(caught.value)


def test_settings_that_json_writes_otherwise_are_no_difference(tmp_path):
    binding = {"targets": ("q_proj", "v_proj")}
    write_checkpoint(tmp_path, snapshot(5), binding=binding, world_size=1, before_commit=lambda: None)
    assert newest_valid(tmp_path, binding)[0] == 5


def test_an_attempt_that_was_replaced_moves_nothing(tmp_path, attempt):
    said: list[str] = []
    writer = writer_of(attempt, tmp_path / "checkpoints", said)
    writer.submit(snapshot(5))
    writer.join()
    (tmp_path / "job" / "NEWEST").write_text("002")
    writer.submit(snapshot(10))
    with pytest.raises(StaleAttempt):
        writer.join()
    assert steps_of(tmp_path / "checkpoints") == [5]
    assert (tmp_path / "checkpoints" / LATEST).read_text() == "step-000005"
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_an_attempt_that_is_replaced_between_the_renames_does_not_move_latest(tmp_path):
    write(tmp_path, 5)
    calls = []

    def replaced_after_the_first_look():
        calls.append(1)
        if len(calls) == 2:
            raise StaleAttempt("replaced")

    with pytest.raises(StaleAttempt):
        write(tmp_path, 10, before_commit=replaced_after_the_first_look)
    assert (tmp_path / LATEST).read_text() == "step-000005"


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run(tmp_path, attempt, monkeypatch):
    said: list[str] = []
    writer = writer_of(attempt, tmp_path / "checkpoints", said)
    writer.submit(snapshot(5))
    writer.join()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    writer.submit(snapshot(10))
    writer.join()
    assert "No space left on device: 1 MB are free and a checkpoint needs" in writer.failures[0]
    assert "CHECKPOINT NOT WRITTEN at step 10" in said[0]
    assert newest_valid(tmp_path / "checkpoints", BINDING)[0] == 5


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_quota_that_shows_only_while_writing_leaves_nothing_half_done(tmp_path, attempt, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        usage = shutil.disk_usage("/")
        # As with a quota: the filesystem says that there is room.
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        said: list[str] = []
        writer = writer_of(attempt, disk, said)
        large = snapshot(5)
        writer.submit(large)
        writer.join()
        writer.submit(Snapshot(10, {"a.weight": torch.zeros(200_000)}, {}, large.texts, None))
        writer.join()
        assert len(writer.failures) == 1
        assert sorted(path.name for path in disk.iterdir()) == [LATEST, "step-000005"]
        assert newest_valid(disk, BINDING)[0] == 5
    finally:
        subprocess.run(["umount", disk], check=True)


def test_values_that_are_not_finite_are_not_kept(tmp_path):
    bad = Snapshot(5, {"a.weight": torch.tensor([1.0, float("nan")])}, {}, {}, None)
    with pytest.raises(DamagedCheckpoint, match=r"a\.weight .* not finite"):
        write_checkpoint(tmp_path, bad, binding=BINDING, world_size=1, before_commit=lambda: None)
    assert steps_of(tmp_path) == []


def test_the_newest_ones_and_the_best_one_are_kept(tmp_path):
    for step, loss in ((5, 3.0), (10, 1.0), (15, 2.0), (20, 1.5), (25, None)):
        write(tmp_path, step, loss)
    prune(tmp_path, keep=2)
    assert steps_of(tmp_path) == [25, 20, 10]
    prune(tmp_path, keep=1)
    assert steps_of(tmp_path) == [25, 10]
    # A damaged one is not the best of anything, and no reason to stop.
    truncated(folder_of(tmp_path, 10) / "manifest.json", random.Random(1))
    prune(tmp_path, keep=1)
    assert steps_of(tmp_path) == [25]


def test_a_storage_that_cannot_be_read_now_is_no_reason_to_begin_anew(tmp_path, monkeypatch):
    write(tmp_path, 5)

    def fails(path, *args, **kwargs):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(Path, "read_text", fails)
    with pytest.raises(OSError, match="Stale file handle"):
        newest_valid(tmp_path, BINDING)


def test_what_is_newer_than_the_one_that_is_used_goes_and_its_step_can_be_written_again(tmp_path):
    for step in (5, 10, 15):
        write(tmp_path, step)
    flipped(folder_of(tmp_path, 15) / "optimizer.safetensors", random.Random(1))
    (tmp_path / ".step-000020.77.tmp").mkdir()
    step, _ = newest_valid(tmp_path, BINDING, say=lambda line: None)
    clear_after(tmp_path, step)
    assert steps_of(tmp_path) == [10, 5]
    assert not list(tmp_path.glob(".*"))
    validate(write(tmp_path, 15))
