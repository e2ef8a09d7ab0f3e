"""The model and rows of the training stage are made once on a storage, whoever checks it at the same time."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

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
