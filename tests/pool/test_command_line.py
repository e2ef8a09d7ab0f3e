"""``python -m tasks.pool`` over runs on disk, with jobs that have ended and jobs that have not."""

import json
from pathlib import Path

import pytest
import yaml

from tasks.contracts.deployments import deployment_values
from tasks.contracts.files import write_json
from tasks.contracts.overrides import read_experiment
from tasks.contracts.run_folder import RunFolder
from tasks.pool.__main__ import main
from tasks.pool.attempts import begin_attempt, newest_attempt
from tasks.pool.stage_jobs import training_job

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.fixture
def storage(tmp_path):
    """One run of two attempts at training: the first failed, the second ended well."""
    values = deployment_values("demo") | {"storage": {"shared": str(tmp_path)}}
    experiment = read_experiment(values)
    folder = RunFolder(experiment.storage, "mine")
    job = training_job(experiment, folder, dataset=str(folder.dataset))
    Path(job.folder).mkdir(parents=True)
    write_json(folder.experiment, {"experiment": experiment.model_dump(mode="json")})
    first = begin_attempt(job, None, "local")
    write_json(first / "exit.json", {"state": "failed", "reason": "node 1's torchrun agent ended with exit code 1"})
    write_json(
        first / "node-1.failures.json",
        [{"rank": 1, "exit_code": 1, "message": "ValueError: bad row 17", "traceback": "Traceback ...", "time": 1}],
    )
    second = begin_attempt(job, newest_attempt(Path(job.folder)), "local")
    (second / "node-0.log").write_text("step 1\nstep 2\n")
    (second / "node-1.log").write_text("hello\n")
    write_json(second / "exit.json", {"state": "succeeded", "reason": ""})
    write_json(second / "result.json", {})
    return tmp_path


def run(storage, *words) -> int:
    return main(["--storage", str(storage), *words])


def test_list_shows_the_newest_attempts_and_all_of_them_when_asked(storage, capsys):
    assert run(storage, "list") == 0
    out = capsys.readouterr().out
    assert "mine/train_adapter/002  succeeded" in out
    assert "/001" not in out
    assert run(storage, "list", "--all") == 0
    assert "mine/train_adapter/001  failed" in capsys.readouterr().out


def test_show_tells_the_failing_ranks_error_and_says_by_its_exit_status_that_it_failed(storage, capsys):
    assert run(storage, "show", "mine/train_adapter/001") == 1
    out = capsys.readouterr().out
    assert "rank 1 (node 1): ValueError: bad row 17" in out
    assert "2 nodes x 1 processes, on CPUs" in out
    assert run(storage, "show", "mine/train_adapter") == 0


def test_logs_are_those_of_all_nodes_or_of_one(storage, capsys):
    assert run(storage, "logs", "mine/train_adapter") == 0
    assert capsys.readouterr().out.splitlines() == ["[node 0] step 1", "[node 0] step 2", "[node 1] hello"]
    assert run(storage, "logs", "mine/train_adapter", "--node", "1") == 0
    assert capsys.readouterr().out == "hello\n"


def test_a_job_that_has_ended_is_not_cancelled(storage, capsys):
    assert run(storage, "cancel", "mine") == 0
    assert "mine/train_adapter/002: succeeded already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("other", "has no run 'other'; there are: mine"),
        ("mine/evaluate", "run mine has: mine/train_adapter/002"),
        ("../mine", "not a usable name"),
    ],
)
def test_a_name_of_nothing_lists_what_there_is(storage, capsys, name, said):
    assert run(storage, "show", name) == 2
    assert said in capsys.readouterr().err


def test_rendering_writes_nothing_and_names_the_next_attempt(storage, capsys):
    before = sorted(storage.rglob("*"))
    words = ["render", "finetune/demo", "--backend", "slurm", "--run", "mine", "--set", f"storage.shared={storage}"]
    assert run(storage, *words) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n#SBATCH --job-name=mine-train-adapter\n")
    assert f"{storage}/runs/mine/jobs/train_adapter/003/spec.json" in script
    assert sorted(storage.rglob("*")) == before


def test_the_kubernetes_objects_are_those_that_are_made(storage, capsys):
    settings = {
        "storage.shared": storage,
        "pool.kubernetes.image": "registry.example/image:1",
        "pool.kubernetes.volumes": f"[{{mount_path: {storage}, claim: shared}}]",
    }
    words = ["render", "demo", "--backend", "kubernetes", "--run", "mine"]
    assert run(storage, *words) == 2
    assert "pool.kubernetes.image is empty" in capsys.readouterr().err
    for name, value in settings.items():
        words += ["--set", f"{name}={value}"]
    assert run(storage, *words) == 0
    job, service = yaml.safe_load_all(capsys.readouterr().out)
    assert (job["kind"], job["spec"]["completions"]) == ("Job", 2)
    assert service["metadata"]["name"] == job["metadata"]["name"]


def test_the_torchrun_lines_name_a_spec_that_is_there_when_asked_for(storage, capsys):
    words = ["render", "demo", "--backend", "torchrun", "--run", "new", "--write", "--set", f"storage.shared={storage}"]
    assert run(storage, *words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NODE_RANK=")]
    assert len(lines) == 2
    spec = Path(lines[0].split()[-1])
    assert json.loads(spec.read_text())["module"] == "tasks.training"
    assert "--nnodes=2 --nproc-per-node=1" in lines[1]


def test_a_spec_to_run_by_hand_is_not_put_beside_the_attempts_of_a_run(storage, capsys):
    before = sorted(storage.rglob("*.json")), (storage / "runs/mine/jobs/train_adapter/NEWEST").read_text()
    words = [
        "render", "demo", "--backend", "torchrun", "--run", "mine", "--write", "--set", f"storage.shared={storage}",
    ]  # fmt: skip
    assert run(storage, *words) == 2
    assert "train_adapter/002 is an attempt at this job already; choose a run of your own" in capsys.readouterr().err
    assert (sorted(storage.rglob("*.json")), (storage / "runs/mine/jobs/train_adapter/NEWEST").read_text()) == before


def test_a_deployment_that_is_none_lists_those_there_are(storage, capsys):
    assert run(storage, "render", "finetune/nothing", "--backend", "slurm") == 2
    assert "demo, demo-slurm, poc, poc-qwen2-7b, poc-reference" in capsys.readouterr().err
