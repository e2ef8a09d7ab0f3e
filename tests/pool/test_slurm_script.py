"""The sbatch script, whole, and what cannot stand in one."""

import dataclasses
import subprocess
from pathlib import Path

import pytest
from pydantic import ValidationError

from tasks.contracts.files import write_json
from tasks.contracts.job import JobSpec, JobState, PoolError
from tasks.contracts.pool_settings import SlurmSettings
from tasks.pool import slurm, slurm_commands
from tasks.pool.slurm import SlurmPool
from tasks.pool.slurm_script import sbatch_script

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
JOB = JobSpec(
    "run-train-adapter",
    "tasks.training",
    {},
    "/shared/runs/run/jobs/train_adapter",
    num_nodes=2,
    processes_per_node=8,
    gpus=True,
    env={"PYTHONPATH": "/shared/it's code", "LINES": "a\nb $HOME"},
    time_limit_s=14_400,
)
ATTEMPT = Path("/shared/runs/run/jobs/train_adapter/001")
FULL = SlurmSettings(
    partition="gpu",
    account="team",
    qos="high",
    constraint="h200&ib",
    reservation="poc",
    cpus_per_node=128,
    memory_per_node_gbytes=1500,
    exclusive=True,
    directives=("--mail-type=FAIL",),
    setup=("module load cuda/12.8",),
    python="/shared/venv/bin/python",
    container_image="/shared/images/train.sqsh",
    container_mounts=("/shared:/shared",),
    env={"NCCL_IB_HCA": "mlx5"},
    leave_before_end_s=120,
)
SMALL = dataclasses.replace(JOB, gpus=False, processes_per_node=1, num_nodes=1, env={})


@pytest.mark.parametrize(
    ("name", "job", "settings", "network"),
    [
        ("full", JOB, FULL, "infiniband"),
        ("small", SMALL, SlurmSettings(python="/usr/bin/python3", requeue=False), "auto"),
    ],
)
def test_the_whole_script(name, job, settings, network):
    script = sbatch_script(job, ATTEMPT, "0f1e2d3c4b5a", settings, network)
    assert script == (GOLDEN / f"slurm-{name}.sbatch").read_text()
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


@pytest.mark.parametrize("name", ["a b", "$(true)", 'a"b', "a\nb", ""])
def test_a_name_that_the_shell_could_read_is_refused(name):
    with pytest.raises(ValueError, match="no name for a job"):
        sbatch_script(dataclasses.replace(JOB, name=name), ATTEMPT, "0f1e2d3c4b5a", FULL)


@pytest.mark.parametrize(
    "values",
    [{"partition": "a b"}, {"account": 'a"'}, {"qos": "$x"}, {"directives": ["--a\n--b"]}, {"env": {"a b": "c"}},
     {"forward_env": ["A=B"]}],
)  # fmt: skip
def test_settings_that_could_leave_their_line_are_refused(values):
    with pytest.raises(ValidationError):
        SlurmSettings(**values)


def test_without_slurms_commands_it_says_where_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    job = dataclasses.replace(SMALL, folder=str(tmp_path / "job"))
    with pytest.raises(PoolError, match=r"sbatch not found.*login node"):
        SlurmPool(SlurmSettings()).submit(job)


def test_what_a_node_wrote_may_be_seen_late_but_not_never(tmp_path, monkeypatch):
    attempt = tmp_path / "001"
    attempt.mkdir()
    write_json(attempt / "handle.json", {"slurm_job_id": "7"})
    monkeypatch.setattr(slurm, "_state_of", lambda number: "COMPLETED")
    pool = SlurmPool(SlurmSettings())
    assert pool.state(attempt) is JobState.RUNNING
    monkeypatch.setattr(slurm, "STORAGE_LAG_S", -1)
    assert pool.state(attempt) is JobState.FAILED
    write_json(attempt / "exit.json", {"state": "succeeded", "exit_code": 0})
    assert pool.state(attempt) is JobState.FAILED
    write_json(attempt / "result.json", {})
    assert pool.state(attempt) is JobState.SUCCEEDED


def test_a_controller_that_is_away_is_quoted_and_fails_nothing(tmp_path, monkeypatch):
    def away(number):
        raise PoolError("squeue: Unable to contact slurm controller")

    write_json(tmp_path / "handle.json", {"slurm_job_id": "7"})
    monkeypatch.setattr(slurm, "_state_of", away)
    monkeypatch.setenv("PATH", str(tmp_path))
    pool = SlurmPool(SlurmSettings())
    assert pool.state(tmp_path) is JobState.UNKNOWN
    assert pool.error(tmp_path) is None
    assert "squeue not found" in pool.explain(tmp_path)


def test_what_an_administrator_wrote_in_another_encoding_is_read_all_the_same(tmp_path, monkeypatch):
    command = tmp_path / "sinfo"
    command.write_text("#!/bin/sh\nprintf 'Ger\\344t defekt\\n'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert slurm_commands.slurm("sinfo") == "Ger\N{REPLACEMENT CHARACTER}t defekt\n"
