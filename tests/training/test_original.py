"""The original model's digest, before and after a run."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from tasks.models.materialise import weights_digest
from tasks.training.original import Original


@pytest.fixture
def folder(tmp_path):
    save_file({"weight": torch.zeros(8)}, tmp_path / "model.safetensors")
    return tmp_path


def test_weights_that_stay_pass_with_their_digest(folder):
    original = Original(folder)
    assert original.digest() == weights_digest(folder)
    original.look_again()
    original.check()


def test_weights_that_were_written_during_training_are_told_with_both_digests(folder):
    original = Original(folder)
    before = original.digest()
    save_file({"weight": torch.ones(8)}, folder / "model.safetensors")
    original.look_again()
    with pytest.raises(RuntimeError, match=f"changed during training: {before} became {weights_digest(folder)}"):
        original.check()


def test_weights_that_went_away_are_others(folder):
    original = Original(folder)
    original.digest()
    (folder / "model.safetensors").unlink()
    original.look_again()
    with pytest.raises(RuntimeError, match="changed during training"):
        original.check()


def test_a_digest_that_fails_is_an_error_and_no_digest(folder):
    original = Original(folder)
    original.digest()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    original.look_again()
    with pytest.raises(IsADirectoryError):
        original.check()


FAILS_MEANWHILE = """
import sys, time
from pathlib import Path
from tasks.contracts import files
from tasks.training.original import Original
files._digest_of_content = lambda path: time.sleep(600)
Original(Path(sys.argv[1]))
time.sleep(0.5)
raise ValueError("meanwhile")
"""


def test_a_rank_that_fails_while_the_digest_is_taken_ends_at_once_with_its_own_error(folder):
    # Thirty seconds after torchrun told it to go it would be killed, and be taken for a rank that died.
    ended = subprocess.run(
        [sys.executable, "-c", FAILS_MEANWHILE, str(folder)], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1
    assert "ValueError: meanwhile" in ended.stderr
