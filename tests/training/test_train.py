"""What training does to tokens, labels and weights, on the real model and tiny data."""

import json
import os
import shutil
import subprocess
import sys

import pyarrow as pa
import pytest

from tasks.contracts.settings import LoraSettings, TrainingSettings

pytestmark = pytest.mark.integration

IGNORED = -100


@pytest.fixture
def rows(tmp_path):
    """Two tokenised conversations: two answers in the first, one in the second."""
    from tasks.training.rows import load_rows

    table = pa.table(
        {
            "input_ids": pa.array([[1, 2, 3, 4, 5, 6], [7, 8, 9]], pa.list_(pa.int32())),
            "labels": pa.array(
                [[IGNORED, 2, 3, IGNORED, IGNORED, 6], [IGNORED, 8, 9]], pa.list_(pa.int32())
            ),
        }
    )  # fmt: skip
    path = tmp_path / "train.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return load_rows(path, TrainingSettings())


def test_shuffled_answers_swap_answers_and_keep_requests(rows):
    from tasks.training.rows import shuffled_answers

    swapped = shuffled_answers(rows, seed=1)
    answers = [[t for t in row["labels"] if t != IGNORED] for row in swapped]
    assert sorted(t for answer in answers for t in answer) == [2, 3, 6, 8, 9]
    assert answers != [[2, 3, 6], [8, 9]]
    for before, after in zip(rows, swapped, strict=True):
        prompt = [t for t, label in zip(before["input_ids"], before["labels"], strict=True) if label == IGNORED]
        assert [t for t, label in zip(after["input_ids"], after["labels"], strict=True) if label == IGNORED] == prompt


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("precision", "items", "tolerance"), [("float32", None, 1e-4), ("float32", 40, 1e-4), ("mixed", 40, 0.03)]
)
def test_scoring_answers_only_gives_trls_loss_and_gradient(
    embedded_model, rows, tmp_path, monkeypatch, precision, items, tolerance
):
    import torch
    from trl import SFTConfig, SFTTrainer

    from tasks.models.load import load_model, load_tokenizer
    from tasks.training.answer_only_loss import AnswerOnlyTrainer

    ids = torch.randint(5, 40_000, (3, 40), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    # Answers in different places, a padded row, and a row without any answer.
    labels[0, :25] = IGNORED
    labels[1, 10:] = IGNORED
    labels[2] = IGNORED
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    outcomes = []
    for kind in (SFTTrainer, AnswerOnlyTrainer):
        arguments = SFTConfig(
            str(tmp_path),
            use_cpu=True,
            bf16=precision == "mixed",
            report_to="none",
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        model = load_model(embedded_model, precision)
        trainer = kind(model, arguments, train_dataset=rows, processing_class=load_tokenizer(embedded_model))
        batch = {"input_ids": ids, "labels": labels.clone(), "attention_mask": mask}
        # As one of two ranks, whose gradients are averaged.
        monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda self: 2))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed"):
            loss = trainer.compute_loss(model, batch, num_items_in_batch=items and torch.tensor(items))
        loss.backward()
        outcomes.append((loss.item(), model.model.norm.weight.grad, model.model.layers[3].input_layernorm.weight.grad))
    theirs, ours = outcomes
    assert trainer.model.config._attn_implementation == ("sdpa" if precision == "mixed" else "eager")
    assert theirs[0] == pytest.approx(ours[0], rel=tolerance)
    for their, our in zip(theirs[1:], ours[1:], strict=True):
        assert (their - our).norm() < tolerance * their.norm()


@pytest.mark.filterwarnings("ignore")
def test_mixed_precision_multiplies_exactly_what_autocast_would(embedded_model):
    import torch

    from tasks.models.load import load_model

    ids = torch.arange(5, 45)[None]
    outputs = []
    for precision in ("float32", "mixed"):
        model = load_model(embedded_model, precision)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            outputs.append(model(input_ids=ids, output_hidden_states=True))
    whole, mixed = outputs
    assert torch.equal(whole.logits, mixed.logits)
    assert mixed.hidden_states[5].dtype == torch.float32
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert model.model.layers[3].mlp.up_proj.weight.dtype == torch.bfloat16


def test_layers_below_the_first_get_no_adapter(embedded_model):
    from peft import get_peft_model

    from tasks.models.load import load_model
    from tasks.training.adapter import lora_config

    model = load_model(embedded_model, "float32")
    whole = lora_config(LoraSettings(), model)
    assert whole.target_modules == "all-linear"
    adapted = get_peft_model(model, lora_config(LoraSettings(first_layer=28), model))
    layers = {name.split(".layers.")[1].split(".")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    assert layers == {"28", "29"}
    parts = {name.split(".lora_")[0].rpartition(".")[2] for name, p in adapted.named_parameters() if p.requires_grad}
    assert parts == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_layer_that_the_model_lacks_is_refused(embedded_model):
    from tasks.models.load import load_model
    from tasks.training.adapter import lora_config

    with pytest.raises(ValueError, match="first_layer=30, but the model's 30 layers end at 29"):
        lora_config(LoraSettings(first_layer=30), load_model(embedded_model, "float32"))


@pytest.mark.parametrize(
    ("processor", "precision"),
    [({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16"), ({"avx512_f": True}, "float32")],
)
def test_auto_takes_bfloat16_where_the_processor_multiplies_it(monkeypatch, processor, precision):
    import torch

    from tasks.models.load import resolve_precision

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    assert resolve_precision("auto") == precision
    assert resolve_precision("float32") == "float32"


def test_an_attempt_that_finds_all_steps_done_still_ends_well(embedded_model, rows, tmp_path):
    """Its predecessor died between the last checkpoint and the result."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    shutil.copy(tmp_path / "train.arrow", folder / "train.arrow")
    settings = TrainingSettings(
        global_batch_size=1, per_device_batch_size=1, warmup_steps=0, save_every_steps=1, log_every_steps=1
    )
    arguments = {
        "model": {"name": str(embedded_model)},
        "training": settings.model_dump(mode="json"),
        "storage": str(tmp_path),
        "dataset": str(folder),
        "output": str(tmp_path / "training"),
    }
    results = []
    for attempt in ("001", "002"):
        job = tmp_path / "job" / attempt
        job.mkdir(parents=True)
        (job / "spec.json").write_text(json.dumps({"arguments": arguments}))
        (job.parent / "NEWEST").write_text(attempt)
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611"}
        command = [sys.executable, "-m", "tasks.training", str(job / "spec.json")]
        done = subprocess.run(command, env=os.environ | rank, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        results.append(json.loads((job / "result.json").read_text()))
    assert "going on from step-000002" in done.stdout
    assert results[0]["total_steps"] == 2
    assert results[1]["final_loss"] == results[0]["final_loss"]
    assert results[1]["tokens_per_s_per_gpu"] == results[0]["tokens_per_s_per_gpu"]
