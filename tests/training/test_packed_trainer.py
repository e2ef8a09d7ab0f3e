"""On a GPU: packed training must have the losses of TRL's own trainer on the same batches."""

import copy
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PhiConfig
from trl import SFTConfig, SFTTrainer

from tasks.contracts.files import write_json
from tasks.contracts.settings import LoraSettings, TrainingSettings
from tasks.models.load import load_tokenizer
from tasks.models.packed_attention import FLEX, PACKED, register
from tasks.training.adapter import lora_config
from tasks.training.packed_trainer import PackedTrainer
from tasks.training.rows import load_rows
from tasks.training.zero3_trainer import is_installed
from tests.conftest import REPOSITORY
from tests.training.toy import POSITIONS, SETTINGS, SIZES, TOTAL_STEPS, arguments, make_model, make_rows, points

pytestmark = [
    pytest.mark.gpu,
    # Shown, and no errors: torch's compiler warns of itself wherever it traces.
    pytest.mark.filterwarnings("default"),
]


LEARNING = {**SIZES, "max_position_embeddings": POSITIONS, "initializer_range": 0.3}
KINDS = {
    "llama": LlamaConfig(**LEARNING),
    # A window shorter than the rows, caps that are met, inside and after the head.
    "gemma2": Gemma2Config(
        **LEARNING, head_dim=16, sliding_window=8, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "phi": PhiConfig(**LEARNING),
}


def trainer(kind, folder, rows, tmp_path, *, attention, **settings):
    torch.manual_seed(0)
    register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").cuda()
    model.set_attn_implementation(attention)
    config = SFTConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        max_steps=1,
        bf16=True,
        activation_checkpointing=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",
        **settings,
    )
    return kind(
        model=model,
        args=config,
        train_dataset=rows,
        processing_class=load_tokenizer(folder),
        peft_config=lora_config(LoraSettings(rank=4, alpha=8), model),
    )


@pytest.mark.parametrize(
    ("model", "attention"), [("llama", PACKED), ("llama", FLEX), ("gemma2", FLEX), ("phi", PACKED)]
)
def test_loss_and_gradients_are_trls(tmp_path, model, attention):
    folder = make_model(tmp_path / "model")
    torch.manual_seed(1)
    made = AutoModelForCausalLM.from_config(KINDS[model])
    if made.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(made.get_output_embeddings().bias)
    made.save_pretrained(folder)
    rows = load_rows(make_rows(tmp_path / "rows") / "train.arrow", TrainingSettings(**SETTINGS)).select_columns(
        ["input_ids", "labels"]
    )
    # The exact attention that caps its scores.
    theirs = trainer(SFTTrainer, folder, rows, tmp_path, attention="eager" if model == "gemma2" else "sdpa")
    ours = trainer(PackedTrainer, folder, rows, tmp_path, attention=attention, padding_free=True)
    # The second factor begins at zero, where the first gets no gradient.
    for model in (theirs.model, ours.model):
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    for start in range(0, 12, 4):
        examples = [rows[i] for i in range(start, start + 4)]
        losses, gradients = [], []
        for each in (theirs, ours):
            batch = each._prepare_inputs(each.data_collator(copy.deepcopy(examples)))
            num_items = (batch["labels"][..., 1:] != -100).sum()
            each.model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = each.compute_loss(each.model, batch, num_items_in_batch=num_items)
            loss.backward()
            losses.append(loss.item())
            gradients.append(
                torch.cat([p.grad.flatten() for p in each.model.parameters() if p.grad is not None]).float()
            )
        assert losses[0] == pytest.approx(losses[1], rel=2e-2)
        assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 5e-2


def learn(root, *, num_gpus=1, **changes):
    """The losses of the toy training, a point a step, by the program under torchrun."""
    job = root / "job"
    (job / "001").mkdir(parents=True)
    told = arguments(
        root,
        make_model(root / "model"),
        make_rows(root / "rows"),
        precision="bfloat16",
        per_device_batch_size=2,
        **changes,
    )
    write_json(job / "001" / "spec.json", {"arguments": told})
    (job / "NEWEST").write_text("001")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_gpus}"]
    done = subprocess.run(
        [*command, "--module", "tasks.training", str(job / "001" / "spec.json")],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert ("the base in shards" in done.stdout) == (changes.get("strategy") == "fsdp")
    losses = [point["train/loss"] for point in points(job).values()]
    assert len(losses) == TOTAL_STEPS
    return losses


@pytest.mark.parametrize("attention", ["varlen", "flex"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_program_learns_on_a_gpu(tmp_path, checkpointing, dropout, attention):
    """Dropout, recomputing and compiled layers together are where the pieces under us disagree."""
    lora = {"rank": 8, "alpha": 16, "dropout": dropout}
    losses = learn(tmp_path, gradient_checkpointing=checkpointing, attention=attention, lora=lora)
    assert losses[-1] < losses[0] - 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_base_in_shards_over_two_gpus_is_the_same_training(tmp_path, checkpointing):
    whole, shards = (
        learn(tmp_path / strategy, num_gpus=2, strategy=strategy, gradient_checkpointing=checkpointing)
        for strategy in ("ddp", "fsdp")
    )
    # Products round at 4e-3, and a learning rate as high as the toy's makes more of it from step to step.
    assert shards[:10] == pytest.approx(whole[:10], abs=1e-2)
    assert shards == pytest.approx(whole, abs=5e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
@pytest.mark.skipif(not is_installed(), reason="DeepSpeed is not installed (the extra zero3)")
def test_zero3_over_two_gpus_learns_the_same(tmp_path):
    whole, shards = (learn(tmp_path / strategy, num_gpus=2, strategy=strategy) for strategy in ("ddp", "zero3"))
    # It multiplies adapters in bfloat16, which `ddp` keeps in float32.
    assert shards == pytest.approx(whole, abs=1e-1)
    assert shards[-1] < shards[0] - 1
