"""DeepSpeed's ZeRO-3: everything in parts, and otherwise the same training, checkpoints and adapter."""

import json
import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tasks.models.load import load_model
from tasks.training.zero3_trainer import is_installed, part_of
from tests.training import toy
from tests.training.test_resume import assert_same_training
from tests.training.toy_ranks import ToyJob

needs_deepspeed = pytest.mark.skipif(not is_installed(), reason="DeepSpeed is not installed (the extra zero3)")

# Two and three ranks divide it, and three do not divide the adapter's matrices.
SETTINGS = {"global_batch_size": 6, "num_epochs": 3, "lora": {"dropout": 0.1}}
LIMIT_S = 240


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory) -> ToyJob:
    """The run that nothing happens to, with everything on each of two ranks."""
    root = tmp_path_factory.mktemp("whole")
    job = ToyJob(root, toy.arguments(root, home / "model", home / "dataset", **SETTINGS))
    job.run(2)
    return job


@pytest.fixture
def zero3_job(toy_job):
    return lambda **changes: toy_job(**SETTINGS | changes)


def loaded_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(load_model(base, "float32"), str(adapter))
    return {name.replace(".default.", "."): p for name, p in model.named_parameters() if "lora_" in name}


def test_a_part_that_the_ranks_do_not_divide_is_filled_up():
    whole = torch.arange(10.0).reshape(2, 5)
    parts = [part_of(whole, 4, rank) for rank in range(3)]
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]


@needs_deepspeed
@pytest.mark.integration
def test_a_gradient_that_overflows_ends_the_run(zero3_job):
    job = zero3_job(strategy="zero3")
    attempt = job.start(2, overflow={"rank": 1, "forward": 7})
    assert 1 in attempt.wait(LIMIT_S)
    assert "GradientNotFinite: the gradient of step 3 is no finite number" in attempt.error(0)
    assert not attempt.error(1)


@needs_deepspeed
@pytest.mark.integration
@pytest.mark.parametrize("checkpointing", [False, True])
def test_parts_change_what_a_rank_holds_and_nothing_that_is_learnt(home, zero3_job, whole, checkpointing):
    job = zero3_job(strategy="zero3", gradient_checkpointing=checkpointing)
    attempt = job.start(2)
    assert attempt.wait(LIMIT_S) == [0, 0], attempt.output()
    assert_same_training(job, whole)
    held = json.loads((whole.folder / "001" / "result.json").read_text())["held_parameters"]
    assert attempt.result()["held_parameters"] == held / 2
    ours, theirs = (load_file(j.output / "adapter" / "adapter_model.safetensors") for j in (job, whole))
    layout = {name: (tensor.shape, tensor.dtype) for name, tensor in theirs.items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in ours.items()} == layout
    loaded = loaded_by_peft(home / "model", job.output / "adapter")
    assert loaded.keys() == ours.keys()
    assert all(torch.equal(loaded[name], tensor) and tensor.any() for name, tensor in ours.items())
    newest = job.output / "checkpoints" / (job.output / "checkpoints" / "LATEST").read_text().strip()
    theirs = load_file(whole.output / "checkpoints" / newest.name / "optimizer.safetensors")
    ours = load_file(newest / "optimizer.safetensors")
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert {path.suffix for path in job.output.rglob("*") if path.is_file()} <= {
        ".json",
        ".jsonl",
        ".safetensors",
        ".md",
        "",
    }


@needs_deepspeed
@pytest.mark.integration
def test_a_run_goes_on_from_parts_to_whole_to_parts_that_the_ranks_do_not_divide(zero3_job, whole):
    job = zero3_job(strategy="zero3")
    attempt = job.start(2, signal={"rank": 1, "forward": 20, "number": int(signal.SIGTERM)})
    assert attempt.wait(LIMIT_S) == [75, 75], attempt.output()
    job.arguments["training"]["strategy"] = "ddp"
    attempt = job.start(1, signal={"rank": 0, "forward": 33, "number": int(signal.SIGUSR1)})
    assert attempt.wait(LIMIT_S) == [75], attempt.output()
    job.arguments["training"]["strategy"] = "zero3"
    attempt = job.start(3, signal={"rank": 2, "forward": 5, "number": int(signal.SIGTERM)})
    assert attempt.wait(LIMIT_S) == [75, 75, 75], attempt.output()
    job.arguments["training"]["strategy"] = "fsdp"
    attempt = job.start(2, signal={"rank": 1, "forward": 5, "number": int(signal.SIGTERM)})
    assert attempt.wait(LIMIT_S) == [75, 75], attempt.output()
    job.arguments["training"]["strategy"] = "zero3"
    attempt = job.start(3)
    assert attempt.wait(LIMIT_S) == [0, 0, 0], attempt.output()
    assert_same_training(job, whole)


@needs_deepspeed
@pytest.mark.integration
def test_a_bfloat16_adapter_goes_on_from_its_float32_weights_to_the_last_bit(home, tmp_path):
    adapters = []
    for name, fault in (("unbroken", None), ("broken", {"rank": 1, "forward": 20, "number": int(signal.SIGTERM)})):
        root = tmp_path / name
        changes = SETTINGS | {"strategy": "zero3", "precision": "bfloat16"}
        job = ToyJob(root, toy.arguments(root, home / "model", home / "dataset", **changes))
        if fault is not None:
            attempt = job.start(2, signal=fault)
            assert attempt.wait(LIMIT_S) == [75, 75], attempt.output()
        attempt = job.start(2)
        assert attempt.wait(LIMIT_S) == [0, 0], attempt.output()
        adapters.append(load_file(job.output / "adapter" / "adapter_model.safetensors"))
    unbroken, resumed = adapters
    assert {tensor.dtype for tensor in unbroken.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in unbroken.values())
    assert all(torch.equal(resumed[name], tensor) for name, tensor in unbroken.items())
