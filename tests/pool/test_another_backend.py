"""A run that is resumed on another backend: what may still run elsewhere is not doubled, what ended is not asked about."""

from dataclasses import replace

import pytest

from tasks.contracts.files import write_json
from tasks.contracts.job import JobSpec, JobState, PoolError
from tasks.contracts.pool_settings import SlurmSettings
from tasks.pool.attempts import begin_attempt, newest_attempt
from tasks.pool.local import LocalPool
from tasks.pool.slurm import SlurmPool


@pytest.fixture
def job(tmp_path):
    (tmp_path / "mine" / "jobs" / "toy").mkdir(parents=True)
    return JobSpec("toy", "tests.pool.toy_job", {}, str(tmp_path / "mine" / "jobs" / "toy"))


def test_what_may_still_run_on_slurm_is_not_started_here(job, tmp_path):
    attempt = begin_attempt(job, None, "slurm")
    write_json(attempt / "handle.json", {"slurm_job_id": "17"})
    with pytest.raises(ValueError, match=r"mine/toy/001 was submitted to slurm.*tasks\.pool cancel mine/toy"):
        LocalPool(tmp_path / "pool").submit(job)
    assert newest_attempt(attempt.parent) == attempt


def test_what_ended_badly_here_is_begun_anew_on_slurm_without_its_handle_being_read(job):
    attempt = begin_attempt(job, None, "local")
    write_json(attempt / "handle.json", {"token": "t", "pid": 1, "process": "boot/1"})
    write_json(attempt / "exit.json", {"state": "failed", "reason": ""})
    with pytest.raises(PoolError, match="sbatch"):
        SlurmPool(SlurmSettings()).submit(job)
    assert newest_attempt(attempt.parent).name == "002"


def test_what_ended_well_elsewhere_is_adopted_with_its_result(job, tmp_path):
    attempt = begin_attempt(job, None, "slurm")
    write_json(attempt / "handle.json", {"slurm_job_id": "17"})
    write_json(attempt / "exit.json", {"state": "succeeded", "reason": ""})
    write_json(attempt / "result.json", {"sum": 3})
    pool = LocalPool(tmp_path / "pool")
    handle = pool.submit(job)
    assert handle == str(attempt)
    assert pool.state(handle) is JobState.SUCCEEDED
    assert list(pool.logs(handle)) == []


@pytest.mark.parametrize("pool", [lambda tmp: LocalPool(tmp / "pool"), lambda tmp: SlurmPool(SlurmSettings())])
def test_what_was_made_of_other_inputs_is_refused_and_stays(job, tmp_path, pool):
    """As after an update of the project in the middle of a run: the dataset is another, the adapter would be the old one's."""
    attempt = begin_attempt(
        replace(job, arguments={"dataset": "/cache/old", "training": {"save_every_steps": 5}}), None, "local"
    )
    write_json(attempt / "exit.json", {"state": "succeeded", "reason": ""})
    write_json(attempt / "result.json", {"sum": 3})
    # Settings that change nothing that is learnt may change: they are the run's affair, not the pool's.
    same = replace(job, arguments={"training": {"save_every_steps": 7}, "dataset": "/cache/old"})
    assert pool(tmp_path).submit(same) == str(attempt)
    with pytest.raises(ValueError, match=r"toy/001 was made with dataset=/cache/old, now it is /cache/new.*--run"):
        pool(tmp_path).submit(replace(same, arguments=same.arguments | {"dataset": "/cache/new"}))
    assert newest_attempt(attempt.parent) == attempt
    assert (attempt / "result.json").exists()
