"""Time and cost are those of all attempts, failed ones included; what is not there is not invented."""

import pytest

from tasks.contracts.files import write_json
from tasks.contracts.run_folder import CHAMPION_STAGE, STAGES, RunFolder
from tasks.contracts.settings import StorageSettings
from tasks.evaluation.measure import measure


def attempt(
    folder: RunFolder, stage: str, number: str, start: float, end: float, *, gpus: bool, error: str | None = None
):
    at = folder.job(stage) / number
    at.mkdir(parents=True)
    write_json(at / "spec.json", {"num_nodes": 2, "processes_per_node": 8, "gpus": gpus})
    write_json(at / "begun.json", {"time": start})
    if error is None:
        write_json(at / "result.json", {"started": start, "finished": end})
    write_json(at / "summary.json", {"error": error, "states": [{"state": "failed", "time": end}]})


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(StorageSettings(shared=str(tmp_path)), "run")
    for which, loss in (("baseline", 2.0), ("finetuned", 2.1)):
        folder.inference(which).mkdir(parents=True)
        manifest = {"new_tokens_per_s": 50.0, "plain_loss": loss, "num_memory_retries": 1}
        write_json(folder.inference(which) / "manifest.json", manifest)
    attempt(folder, "prepare_dataset", "001", 0, 3600, gpus=False)
    attempt(folder, "train_adapter", "001", 3600, 5400, gpus=True, error="rank 3 ran out of memory in step 2")
    attempt(folder, "train_adapter", "002", 7200, 10800, gpus=True)
    return folder


def test_gpu_hours_hold_failed_attempts_and_no_processors(folder):
    points = [(1, {"gpu/utilization": 0.8, "gpu/memory_share": 0.6}), (2, {"gpu/utilization": 1.0})]
    measured = measure(folder, {"final_loss": 0.5}, points)
    # 16 GPUs for half an hour that failed and one hour that did not.
    assert measured.gpu_hours == pytest.approx(24)
    assert measured.process_hours == pytest.approx(40)
    assert measured.wall_hours == pytest.approx(3)
    assert measured.num_out_of_memory == 3
    assert (measured.gpu_utilization, measured.gpu_memory_share) == (pytest.approx(0.9), 0.6)
    assert measured.plain_loss_increase == pytest.approx(0.05)
    stages = {stage.name: stage for stage in measured.stages}
    assert (stages["train_adapter"].num_attempts, stages["train_adapter"].succeeded) == (2, True)
    # An earlier run's answers were taken: no attempt, and none was needed.
    assert (stages["run_inference_baseline"].num_attempts, stages["run_inference_baseline"].succeeded) == (0, True)


def test_what_was_not_measured_is_none_and_an_unfinished_adapter_is_none_either(folder):
    folder.adapter.mkdir(parents=True)
    (folder.adapter / "adapter_model.safetensors").write_bytes(b"half")
    measured = measure(folder, {}, [])
    assert measured.has_final_checkpoint is False
    assert measured.final_loss is measured.gpu_utilization is measured.original.latency_s is None
    write_json(folder.adapter / "manifest.json", {})
    assert measure(folder, {}, []).has_final_checkpoint is True


def test_a_stage_whose_last_attempt_left_no_result_did_not_succeed(folder):
    attempt(folder, "run_inference_finetuned", "001", 0, 10, gpus=True, error="rank 0 failed")
    stages = {stage.name: stage for stage in measure(folder, {}, []).stages}
    assert stages["run_inference_finetuned"].succeeded is False


def test_what_asking_the_champion_takes_and_whether_it_worked_is_not_the_runs(folder):
    before = measure(folder, {}, [])
    attempt(folder, CHAMPION_STAGE, "001", 10800, 90000, gpus=True, error="rank 0 ran out of memory")
    # It is one of the run's stages all the same, as those who look at its times see.
    assert folder.stages == (*STAGES, CHAMPION_STAGE)
    after = measure(folder, {}, [])
    assert after.stages == before.stages
    assert (after.gpu_hours, after.wall_hours) == (before.gpu_hours, before.wall_hours)
    assert after.num_out_of_memory == before.num_out_of_memory
