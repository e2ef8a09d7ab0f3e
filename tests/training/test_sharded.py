"""The base in shards: less of it on each rank, and otherwise the same training, checkpoints and adapter."""

import json
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.training import toy
from tests.training.test_ranks import apart
from tests.training.test_resume import assert_same_training
from tests.training.toy import arguments, make_model
from tests.training.toy_ranks import ToyJob

pytestmark = pytest.mark.integration

COMPILING_MINUTES = 5.0
"""A step in which layers are compiled takes a minute where others use the processors as well."""


@pytest.mark.parametrize("checkpointing", [False, True])
def test_shards_change_what_a_rank_holds_and_nothing_that_is_learnt(toy_job, unbroken, checkpointing):
    job = toy_job(strategy="fsdp", gradient_checkpointing=checkpointing)
    attempt = job.start(2)
    assert attempt.wait() == [0, 0], attempt.output()
    assert_same_training(job, unbroken)
    shards, held = (
        attempt.result(),
        json.loads((unbroken.folder / "001" / "result.json").read_text())["held_parameters"],
    )
    base = held - shards["trainable_parameters"]
    assert shards["held_parameters"] == shards["trainable_parameters"] + base / 2
    assert f"the base in shards, {shards['held_parameters']:,} parameters a rank" in attempt.output()
    ours, theirs = (load_file(j.output / "adapter" / "adapter_model.safetensors") for j in (job, unbroken))
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}


def run_packed(job: ToyJob, **faults: object) -> None:
    """As on a GPU, which is seen in the log: the curve is to be another trainer's than the one that it is compared with."""
    attempt = job.start(2, packed=True, **faults)
    # Compiling takes its time on processors that others use as well.
    assert attempt.wait(240) == [0, 0], attempt.output()
    output = attempt.output()
    assert "frozen_head_loss" in output.splitlines(), output
    assert ("compile_layers" in output.splitlines()) == ("compiled" in faults)
    assert ("the base in shards" in output) == (job.arguments["training"]["strategy"] == "fsdp")
    # Query, key and value, what follows attention, gate and up, and down of two layers; what is in shards is gathered by
    # itself, and dropout comes between an input and its adapter.
    is_joined = "adapters of 14 layers are multiplied together with their matrices, in 8 products" in output
    training = job.arguments["training"]
    assert is_joined == (training["strategy"] == "ddp" and not training["lora"]["dropout"]), output


# Two at a time: one alone would be end to end with nothing.
@pytest.mark.parametrize("faults", [{}, {"compiled": "aot_eager"}])
def test_conversations_end_to_end_are_the_same_training(toy_job, unbroken, faults):
    job = toy_job(per_device_batch_size=2, collective_timeout_minutes=COMPILING_MINUTES)
    run_packed(job, **faults)
    assert_same_training(job, unbroken, is_balanced=True)


def test_layers_with_dropout_are_compiled_to_the_same_but_for_the_masks_that_inductor_draws(toy_job, unbroken):
    changes = {"per_device_batch_size": 2, "collective_timeout_minutes": COMPILING_MINUTES, "lora": {"dropout": 0.2}}
    plain, compiled = (toy_job(name, **changes) for name in ("plain", "compiled"))
    run_packed(plain)
    # This backend takes torch's own masks.
    run_packed(compiled, compiled="aot_eager")
    assert_same_training(compiled, plain, is_balanced=True)
    with_dropout, without = (
        [point["train/loss"] for point in toy.points(job.folder).values()] for job in (plain, unbroken)
    )
    # The first step's adapters are zeros.
    assert all(abs(one - other) > 1e-3 for one, other in zip(with_dropout[3:], without[3:], strict=True))


def test_conversations_end_to_end_go_on_from_a_checkpoints_weights(toy_job, unbroken):
    job = toy_job(per_device_batch_size=2)
    attempt = job.start(2, packed=True, signal={"rank": 0, "forward": 9})
    assert attempt.wait() == [75, 75], attempt.output()
    run_packed(job)
    assert_same_training(job, unbroken, is_balanced=True)


def test_shards_end_to_end_in_compiled_layers_that_are_recomputed_are_the_same_training(toy_job, unbroken):
    changes = {"per_device_batch_size": 2, "collective_timeout_minutes": COMPILING_MINUTES}
    job = toy_job(strategy="fsdp", gradient_checkpointing=True, **changes)
    run_packed(job, compiled="aot_eager")
    assert_same_training(job, unbroken, is_balanced=True)


def test_a_head_that_is_the_embedding_is_gathered_for_both(tmp_path, home):
    make_model(tmp_path / "model", is_tied=True)
    made = {}
    for strategy in ("ddp", "fsdp"):
        root = tmp_path / strategy
        told = arguments(root, tmp_path / "model", home / "dataset", strategy=strategy, per_device_batch_size=2)
        made[strategy] = ToyJob(root, told)
    made["ddp"].run(2)
    run_packed(made["fsdp"])
    assert_same_training(made["fsdp"], made["ddp"], is_balanced=True)


def test_a_run_goes_on_with_the_other_strategy_and_on_another_number_of_ranks(toy_job, unbroken):
    job = toy_job(strategy="fsdp")
    attempt = job.start(2, signal={"rank": 1, "forward": 14, "number": int(signal.SIGTERM)})
    assert attempt.wait() == [75, 75], attempt.output()
    job.arguments["training"]["strategy"] = "ddp"
    attempt = job.start(1, signal={"rank": 0, "forward": 33, "number": int(signal.SIGUSR1)})
    assert attempt.wait() == [75], attempt.output()
    job.arguments["training"]["strategy"] = "fsdp"
    job.run(2)
    assert_same_training(job, unbroken)


def held_around_the_look(ranks, folder: Path) -> str:
    import peft

    from tasks.models.load import load_model
    from tasks.models.packed_attention import PACKED, check_kept_apart, register
    from tasks.training.sharded import held_parameters

    model = load_model(folder / "model", "bfloat16", num_shards=2)
    register()
    model.set_attn_implementation(PACKED)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    before = held_parameters(adapted)
    check_kept_apart(adapted.get_base_model())
    return f"{before} {held_parameters(adapted)}"


def test_the_look_whether_conversations_are_kept_apart_gathers_nothing_for_good(tmp_path):
    """On GPUs in bfloat16 the trainer looks; where there is none it would not, so the look is taken by itself."""
    make_model(tmp_path / "model")
    for said in apart(held_around_the_look, tmp_path):
        before, after = map(int, said.split())
        assert before == after
