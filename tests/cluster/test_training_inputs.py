"""The model and rows of the training stage are made once on a storage, whoever checks it at the same time."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.cluster import training_inputs
from tasks.contracts.cluster_settings import ClusterCheck
from tasks.contracts.run_folder import CheckFolder
from tasks.contracts.settings import StorageSettings
from tasks.pool.stage_jobs import probe_job


@pytest.fixture
def check(tmp_path):
    return ClusterCheck(training={"shape": "toy"}, storage={"shared": str(tmp_path)})


def test_two_first_checks_take_turns_and_the_second_finds_all_made(check, monkeypatch):
    made = []

    def make(folder, shape, check):
        # Long enough for the other to come; it must not take this folder away.
        time.sleep(0.2)
        (folder / "weights").write_text("whole")
        made.append(folder.name)

    monkeypatch.setattr(training_inputs, "_make_model", make)
    monkeypatch.setattr(training_inputs, "_make_rows", make)
    with ThreadPoolExecutor(2) as both:
        results = list(both.map(training_inputs.make_inputs, [check, check]))
    assert results[0] == results[1]
    assert len(made) == 2
    assert training_inputs.inputs_exist(check)
    for folder in training_inputs.folders(check):
        assert (folder / "weights").read_text() == "whole"


@pytest.mark.parametrize("gpus", [True, False])
def test_they_are_made_by_one_process_with_a_gpu_where_the_pool_has_some(gpus, tmp_path):
    check = ClusterCheck(pool={"num_nodes": 2, "processes_per_node": 8, "gpus": gpus})
    job = probe_job(check, CheckFolder(StorageSettings(shared=str(tmp_path)), "x"), "training_inputs")
    assert (job.num_nodes, job.processes_per_node, job.gpus) == (1, 1, gpus)


@pytest.mark.parametrize("parts", [1, 3])
def test_weights_are_written_as_transformers_writes_and_reads_them(parts, tmp_path, monkeypatch):
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    size = sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setattr(training_inputs, "SHARD_SIZE", -(-size // parts) + 4096)
    (tmp_path / "ours").mkdir()
    training_inputs._save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs", max_shard_size=training_inputs.SHARD_SIZE)
    ours, theirs = ({file.name for file in (tmp_path / who).iterdir()} for who in ("ours", "theirs"))
    assert ours == theirs
    for name in ours:
        if name.endswith(".json"):
            assert json.loads((tmp_path / "ours" / name).read_text()) == json.loads(
                (tmp_path / "theirs" / name).read_text()
            )
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) == parts
    loaded, told = LlamaForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(told.values())
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
