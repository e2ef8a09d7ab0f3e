"""Whatever happens to its ranks, a training ends as the unbroken one: the same rows, the same curve, the same adapter."""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tasks.training.checkpoints import steps_of, validate
from tasks.training.ledger import committed, prove
from tasks.training.order import training_order
from tests.training import toy
from tests.training.toy_ranks import ToyJob

pytestmark = pytest.mark.integration

SAME = 1e-4
"""Of losses, in nats per token: what another order of float32 sums leaves after all steps."""
LOSS, RATE = "train/loss", "train/learning_rate"


def assert_same_training(job: ToyJob, unbroken: ToyJob, *, tolerance: float = SAME, is_balanced: bool = False) -> None:
    """Args: is_balanced: within a step the rows may come in another order, as they do where micro-batches are balanced."""
    ours, theirs = toy.points(job.folder), toy.points(unbroken.folder)
    assert list(ours) == list(theirs)
    for step, point in theirs.items():
        assert ours[step][RATE] == pytest.approx(point[RATE], rel=1e-9)
        assert ours[step][LOSS] == pytest.approx(point[LOSS], abs=tolerance), f"step {step}"
    _, our_rows, _ = committed(job.output / "ledger")
    _, their_rows, _ = committed(unbroken.output / "ledger")
    if is_balanced:
        our_rows, their_rows = ({step: sorted(rows) for step, rows in r.items()} for r in (our_rows, their_rows))
    assert our_rows == their_rows
    assert prove(job.output / "ledger").num_steps == toy.TOTAL_STEPS
    mine, other = (load_file(j.output / "adapter" / "adapter_model.safetensors") for j in (job, unbroken))
    assert max(float((mine[name] - other[name]).abs().max()) for name in other) < 10 * tolerance


def test_the_toy_learns_so_that_equal_losses_mean_something(unbroken):
    losses = [point[LOSS] for point in toy.points(unbroken.folder).values()]
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize(("num_ranks", "micro_batch"), [(1, 4), (2, 2)])
def test_ranks_and_accumulation_change_neither_rows_nor_losses(toy_job, unbroken, num_ranks, micro_batch):
    job = toy_job(per_device_batch_size=micro_batch)
    job.run(num_ranks)
    assert_same_training(job, unbroken)


def test_each_step_takes_the_rows_that_the_order_says(home, unbroken):
    from tasks.contracts.settings import TrainingSettings
    from tasks.training.rows import load_rows, num_tokens

    settings = TrainingSettings(**unbroken.arguments["training"])
    lengths = num_tokens(load_rows(home / "dataset" / "train.arrow", settings))
    order = training_order(lengths, global_batch_size=4, steps_per_epoch=12, num_epochs=2, seed=settings.seed)
    _, rows, _ = committed(unbroken.output / "ledger")
    assert [rows[step] for step in sorted(rows)] == [order[at : at + 4] for at in range(0, len(order), 4)]


def test_a_signal_to_any_rank_ends_all_after_one_step_with_75_and_two_ranks_one_two_are_the_unbroken_run(
    toy_job, unbroken
):
    job = toy_job()
    # In the second micro-batch of step 7, on rank 1; the ranks agree with the step after it.
    attempt = job.start(2, signal={"rank": 1, "forward": 14, "number": int(signal.SIGTERM)})
    assert attempt.wait() == [75, 75], attempt.output()
    assert "signal 15 reached rank 1: all ranks save after step 8 and leave" in attempt.output()
    assert steps_of(job.output / "checkpoints")[0] == 8
    attempt = job.start(1, signal={"rank": 0, "forward": 33, "number": int(signal.SIGUSR1)})
    assert attempt.wait() == [75], attempt.output()
    assert "going on from step-000008" in attempt.output()
    job.run(2)
    assert [start.world_size for start in committed(job.output / "ledger")[0]] == [2, 1, 2]
    assert_same_training(job, unbroken)


def test_dropout_and_a_curve_in_coarse_points_have_no_seam_either(toy_job):
    changes = {"lora": {"dropout": 0.2}, "log_every_steps": 6, "save_every_steps": 4}
    whole, broken = toy_job("whole", **changes), toy_job("broken", **changes)
    whole.run(2)
    attempt = broken.start(2, signal={"rank": 0, "forward": 15})
    assert attempt.wait() == [75, 75], attempt.output()
    # On one rank: masks belong to micro-batches, not to ranks.
    broken.run(1)
    assert_same_training(broken, whole)


def test_a_killed_rank_costs_the_steps_since_the_checkpoint_and_nothing_else(toy_job, unbroken):
    job, draw = toy_job(), random.Random(5)
    attempt = job.start(2, pause_s=0.02)
    attempt.wait_for_step(draw.randint(7, 14))
    attempt.kill_one(draw)
    attempt = job.start(2)
    assert attempt.wait() == [0, 0], attempt.output()
    assert "going on from step-0000" in attempt.output()
    assert attempt.result()["num_starts"] == 2
    assert_same_training(job, unbroken)


def copy_of(job: ToyJob, root: Path) -> ToyJob:
    """A run as far as another one: all of its steps done, its result not written."""
    copy = ToyJob(root, job.arguments | {"output": str(root / "training")})
    shutil.copytree(job.output, copy.output)
    shutil.copytree(job.folder, copy.folder)
    return copy


def test_a_damaged_checkpoint_is_passed_over_by_all_ranks_and_made_again(unbroken, tmp_path):
    job = copy_of(unbroken, tmp_path)
    assert steps_of(job.output / "checkpoints")[:2] == [24, 20]
    path = job.output / "checkpoints" / "step-000024" / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    attempt = job.start(2)
    assert attempt.wait() == [0, 0], attempt.output()
    assert "step-000024: optimizer.safetensors is damaged (its digest differs)" in attempt.output()
    assert "going on from step-000020" in attempt.output()
    validate(path.parent)
    assert_same_training(job, unbroken)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_adapter_of_a_checkpoint_loads_with_plain_peft(home, unbroken):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    last = unbroken.output / "checkpoints" / "step-000024"
    assert validate(last)["world_size"] == 2
    base = AutoModelForCausalLM.from_pretrained(home / "model")
    ids = torch.tensor([[5, 28, 15, 14]])
    before = base(input_ids=ids).logits
    model = PeftModel.from_pretrained(base, last / "adapter")
    assert not torch.allclose(model(input_ids=ids).logits, before)
    final = load_file(unbroken.output / "adapter" / "adapter_model.safetensors")
    saved = load_file(last / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == final.keys()
    assert all(torch.equal(final[name], tensor) for name, tensor in saved.items())
    assert not [path for path in unbroken.output.rglob("*") if path.suffix in (".pt", ".bin", ".pth", ".pkl")]


def test_an_attempt_that_outlived_its_node_cannot_write(toy_job, unbroken):
    job = toy_job()
    stale = job.start(1, pause_s=0.03)
    stale.wait_for_step(6)
    # Its node is thought dead and a successor is started, while it still trains.
    result = job.run(2)
    assert stale.wait() == [1]
    assert "StaleAttempt: attempt 001" in stale.error(0)
    assert not (stale.folder / "result.json").exists()
    assert result["num_starts"] == 2
    assert_same_training(job, unbroken)


# Step 7 comes after a checkpoint, which one rank writes and the other does not.
@pytest.mark.parametrize("rank", [0, 1])
def test_a_hung_rank_is_named_and_its_attempt_ended(toy_job, rank):
    job = toy_job(collective_timeout_minutes=0.05)
    attempt = job.start(2, hang={"rank": rank, "forward": 13})
    attempt.wait_for_step(6)
    attempt.ranks[0].join(30)
    assert attempt.ranks[0].exitcode == 1, attempt.output()
    attempt.ranks[1].kill()
    error = attempt.error(0)
    assert f"HungRank: rank {rank} stands still since" in error
    assert "step 7, forward pass of micro-batch 1" in error
    assert "training.collective_timeout_minutes=0.05" in error


@pytest.mark.parametrize(("rank", "step"), [(1, 4), (0, 6), (1, 6)], ids=str)
def test_a_hang_at_a_logged_point_is_one_of_its_step(toy_job, rank, step):
    job = toy_job(collective_timeout_minutes=0.05)
    attempt = job.start(2, hang_at_point={"rank": rank, "step": step})
    attempt.wait_for_step(step)
    attempt.ranks[0].join(30)
    attempt.ranks[1].kill()
    error = attempt.error(0)
    # The other one waits for it in the same place: before a checkpoint as after one.
    assert "HungRank: all 2 ranks stand still since" in error
    assert f"step {step}, waiting for its end on the device" in error


def test_a_steps_rows_are_read_before_the_point_of_the_one_before_is_waited_for(toy_job, tmp_path):
    toy_job().run(2, events=str(tmp_path / "events"))
    events = (tmp_path / "events").read_text().splitlines()
    last = toy.TOTAL_STEPS
    pairs = [event for step in range(1, last) for event in (f"read {step + 1}", f"log {step}")]
    assert events == ["read 1", *pairs, f"log {last}"]


def test_a_loss_that_is_no_number_ends_the_run_with_its_rows_and_spoils_no_checkpoint(toy_job, unbroken):
    job = toy_job()
    attempt = job.start(2, nan={"rank": 1, "forward": 18})
    assert 1 in attempt.wait()
    _, rows, _ = committed(unbroken.output / "ledger")
    # The second micro-batch of rank 1 is the last row of the step.
    assert f"the loss of step 9 is nan on rank 1, for the rows {rows[9][3]} of" in attempt.error(0)
    assert not attempt.error(1)
    assert steps_of(job.output / "checkpoints") == [5]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_gradient_that_overflows_ends_the_run_before_its_step_is_saved(toy_job, unbroken, strategy):
    job = toy_job(strategy=strategy)
    # The second micro-batch of step 10, after which a checkpoint is due.
    attempt = job.start(2, overflow={"rank": 1, "forward": 20})
    assert 1 in attempt.wait()
    _, rows, _ = committed(unbroken.output / "ledger")
    error = attempt.error(0)
    assert "GradientNotFinite: the gradient of step 10 is no finite number (its norm is nan)" in error
    assert f"for the rows {', '.join(map(str, rows[10]))} of the training file" in error
    assert not attempt.error(1)
    assert steps_of(job.output / "checkpoints") == [5]
    job.run(2)
    assert_same_training(job, unbroken)


def test_out_of_memory_is_retried_once_with_a_smaller_micro_batch(toy_job, unbroken):
    job = toy_job(per_device_batch_size=2)
    attempt = job.start(2, memory_rows=1)
    assert 1 in attempt.wait()
    assert "ran out of memory in step 1 with 2 conversations at a time. Started again, the run takes 1" in (
        attempt.error(0) + attempt.error(1)
    )
    again = job.start(2, memory_rows=1)
    assert again.wait() == [0, 0], again.output()
    assert "OUT OF MEMORY before" in again.output()
    assert again.result()["per_device_batch_size"] == 1
    assert_same_training(job, unbroken)


def test_what_is_left_to_the_program_trains_the_same(toy_job, unbroken):
    job = toy_job(per_device_batch_size="auto", gradient_checkpointing="auto")
    attempt = job.start(2)
    assert attempt.wait() == [0, 0], attempt.output()
    assert "1 at a time, activations kept: a processor's memory is not planned for" in attempt.output()
    assert_same_training(job, unbroken)


@pytest.mark.parametrize(("recomputed", "passes"), [(False, [1, 1]), (2, [2, 1]), (True, [2, 2])])
def test_layers_that_are_recomputed_learn_the_same(toy_job, unbroken, tmp_path, recomputed, passes):
    job = toy_job(gradient_checkpointing=recomputed)
    attempt = job.start(2, count_layers=str(tmp_path / "layers.json"))
    assert attempt.wait() == [0, 0], attempt.output()
    counts = json.loads((tmp_path / "layers.json").read_text())
    # Two micro-batches of each rank in each step.
    assert [counts[layer] / (2 * toy.TOTAL_STEPS) for layer in ("0", "1")] == passes
    assert_same_training(job, unbroken)


def test_a_full_disk_does_not_end_training_and_the_result_says_so(toy_job, unbroken):
    job = toy_job()
    attempt = job.start(2, free_bytes=1_000_000)
    assert attempt.wait() == [0, 0], attempt.output()
    assert len(attempt.result()["failed_checkpoints"]) == 5
    assert "CHECKPOINT NOT WRITTEN at step 5" in attempt.output()
    assert toy.points(job.folder)[24]["train/failed_checkpoints"] == 4
    assert_same_training(job, unbroken)


def test_a_run_that_cannot_be_is_told_by_rank_0_alone(toy_job):
    attempt = toy_job(global_batch_size=5, lora={"first_layer": 2}).start(2)
    assert attempt.wait() == [1, -signal.SIGTERM], attempt.output()
    assert "training.global_batch_size=5 is not a multiple of 2 ranks; use 4 or 6" in attempt.error(0)
    assert "first_layer=2, but the model's 2 layers end at 1" in attempt.error(0)
    assert attempt.error(1) == ""
    assert "rror" not in (attempt.folder / "rank-1.log").read_text()


def test_a_checkpoint_of_other_settings_or_another_base_is_refused(unbroken, tmp_path):
    job = copy_of(unbroken, tmp_path)
    toy.make_model(tmp_path / "other", seed=2)
    # What changes nothing that is learnt may change.
    changes = {"learning_rate": 1e-4, "per_device_batch_size": 2}
    job.arguments |= {
        "model": {"name": str(tmp_path / "other")},
        "training": job.arguments["training"] | changes,
    }
    attempt = job.start(2)
    assert attempt.wait() == [1, -signal.SIGTERM]
    error = attempt.error(0)
    assert "ForeignCheckpoint" in error
    assert "training.learning_rate: 0.01 there, 0.0001 now" in error
    assert "base_weights_sha256" in error
    assert "per_device" not in error


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_merged_model_says_what_base_and_adapter_say(home, toy_job):
    import torch
    from transformers import AutoModelForCausalLM

    job = toy_job(merge_adapter=True)
    result = job.run(1)
    assert result["merged_max_difference"] < 1e-4
    assert result["merged_agreement"] == 1
    merged = AutoModelForCausalLM.from_pretrained(result["merged"])
    base = AutoModelForCausalLM.from_pretrained(home / "model")
    assert not torch.equal(merged.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)
    manifest = json.loads((Path(result["merged"]) / "manifest.json").read_text())
    assert manifest["base_weights_sha256"] == result["base_weights_sha256"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_merged_model_that_its_precision_spoils_is_not_published(home, unbroken, tmp_path):
    from tasks.contracts.settings import TrainingSettings
    from tasks.training.merge import BadMerge, merge_adapter
    from tasks.training.rows import load_rows

    rows = load_rows(home / "dataset" / "train.arrow", TrainingSettings())
    model = tmp_path / "coarse"
    shutil.copytree(home / "model", model)
    config = json.loads((model / "config.json").read_text())
    # Four bits of each number: what is saved is another model than what was merged.
    (model / "config.json").write_text(json.dumps(config | {"dtype": "float8_e4m3fn"}))
    with pytest.raises(BadMerge, match="chooses the token of base"):
        merge_adapter(model, unbroken.output / "adapter", rows, tmp_path / "merged", base_digest="-")
    assert not (tmp_path / "merged").exists()
