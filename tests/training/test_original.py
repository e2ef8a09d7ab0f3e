"""The original model's digest, before and after a run."""

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


@pytest.mark.parametrize("is_begun_before", [True, False])
def test_weights_that_were_written_during_training_are_told_with_both_digests(folder, is_begun_before):
    original = Original(folder)
    before = original.digest()
    save_file({"weight": torch.ones(8)}, folder / "model.safetensors")
    if is_begun_before:
        original.look_again()
    with pytest.raises(RuntimeError, match=f"changed during training: {before} became {weights_digest(folder)}"):
        original.check()


def test_weights_that_went_away_are_others(folder):
    original = Original(folder)
    original.digest()
    (folder / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="changed during training"):
        original.check()
