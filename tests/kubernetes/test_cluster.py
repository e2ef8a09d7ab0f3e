"""The Kubernetes pool on a real cluster, run inside it by ``make test-kubernetes`` with the rights that a flow has."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.contracts.job import JobFailed, JobState
from tasks.contracts.kubernetes_settings import KubernetesSettings
from tasks.pool import kubernetes
from tasks.pool.kubernetes import KubernetesPool
from tasks.pool.kubernetes_api import ApiError, open_api, path_of
from tasks.pool.kubernetes_attempt import AttemptObjects
from tasks.pool.supervise import Watch, supervise
from tests.conftest import REPOSITORY
from tests.pool.any_pool import AnyPool, attempts, job, wait_for

SETTINGS = "PROVING_GROUND_TEST_POOL"
"""The pool's settings as JSON, which the driver sets."""
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", autouse=True)
def _cluster():
    if SETTINGS not in os.environ:
        pytest.skip("cluster")


@pytest.fixture
def settings():
    return KubernetesSettings.model_validate_json(os.environ[SETTINGS])


@pytest.fixture
def pool(settings):
    return KubernetesPool(settings)


def objects(handle) -> AttemptObjects:
    return AttemptObjects(open_api(None), Path(handle))


def test_the_real_training_program_trains_on_two_pods(pool, tmp_path):
    from tests.kubernetes.tiny_training import write_tiny_training

    arguments = write_tiny_training(tmp_path / "run")
    spec = dataclasses.replace(job(tmp_path, name="training"), module="tasks.training", arguments=arguments)
    points = []
    result = supervise(pool, spec, Watch(on_metrics=lambda step, at, values: points.append(step)))
    assert result["world_size"] == 2
    assert result["total_steps"] == 4
    assert points == [1, 2, 3, 4]
    assert list((Path(result["adapter"])).glob("*.safetensors"))
    # What `kubectl logs` shows is what the flow read.
    handle = tmp_path / "jobs" / "training" / "001"
    for node, pod in enumerate(objects(handle).pods()):
        log = (handle / f"node-{node}.log").read_text().splitlines()
        assert objects(handle).pod_log(pod).splitlines()[-1:] == [line for line in log if line.strip()][-1:]


def test_a_rank_has_no_rights_and_a_root_that_it_cannot_write(pool, tmp_path, settings):
    odd = "a\nb $(HOME) $$x"
    spec = job(tmp_path, name="confined", num_nodes=1)
    spec = dataclasses.replace(spec, module="tests.kubernetes.confined_job", env=dict(spec.env) | {"ODD": odd})
    result = supervise(pool, spec, Watch())
    assert result["user"] == settings.run_as_user != 0
    assert not result["has_token"]
    assert not result["may_write_root"]
    assert result["odd"] == odd
    assert result["shared_memory_bytes"] > 64 << 20


def test_the_flow_may_not_read_secrets(settings):
    with pytest.raises(ApiError, match=r'cannot list resource "secrets"'):
        open_api(None).request("GET", path_of("v1", settings.namespace, "secrets"))


def test_cancel_leaves_no_job_and_no_pod(pool, tmp_path):
    handle = pool.submit(job(tmp_path, hang=True))
    wait_for(pool, handle, "rank 0 sees the sum", limit_s=300)
    pool.cancel(handle)
    assert objects(handle).job() is None
    assert not [pod for pod in objects(handle).pods() if pod["status"]["phase"] in ("Pending", "Running")]


def test_a_deleted_pod_ends_the_job_and_is_never_success(pool, tmp_path, settings):
    handle = pool.submit(job(tmp_path, hang=True))
    wait_for(pool, handle, "rank 1 sees the sum", limit_s=300)
    pod = objects(handle).pods()[1]
    open_api(None).request("DELETE", path_of("v1", settings.namespace, "pods", pod["metadata"]["name"]))
    deadline = time.monotonic() + 180
    while not pool.state(handle).is_final and time.monotonic() < deadline:
        time.sleep(1)
    assert pool.state(handle) in (JobState.PREEMPTED, JobState.FAILED)
    assert pool.error(handle) is not None
    pool.cancel(handle)


def test_a_job_that_somebody_deletes_is_cancelled(pool, tmp_path):
    handle = pool.submit(job(tmp_path, hang=True))
    wait_for(pool, handle, "rank 0 sees the sum", limit_s=300)
    there = objects(handle)
    there.delete_job(there.job())
    deadline = time.monotonic() + 180
    while not pool.state(handle).is_final and time.monotonic() < deadline:
        time.sleep(0.5)
    assert pool.state(handle) is JobState.CANCELLED


def test_an_image_that_is_not_there_is_named(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(kubernetes, "CANNOT_START_LIMIT_S", 5)
    missing = "registry.invalid/proving-ground:not-there"
    wrong = KubernetesPool(settings.model_copy(update={"image": missing, "image_pull_policy": "IfNotPresent"}))
    with pytest.raises(JobFailed, match=r"(ErrImagePull|ImagePullBackOff).*registry\.invalid"):
        supervise(wrong, job(tmp_path), Watch())


def test_more_than_the_cluster_has_waits_with_its_reason_and_is_withdrawn(settings, tmp_path):
    large = KubernetesPool(settings.model_copy(update={"cpu_per_node": "100000"}))
    told: list[str] = []
    with pytest.raises(JobFailed, match=r"still queued after .*Insufficient cpu"):
        supervise(large, job(tmp_path, queue_limit_s=15), Watch(on_waiting=told.append))
    assert any("nodes are available" in reason for reason in told)


def test_a_flow_killed_hard_leaves_a_job_that_another_adopts(pool, tmp_path):
    script = (
        "import pathlib, sys; from tests.kubernetes.test_cluster import *;"
        "pool = KubernetesPool(KubernetesSettings.model_validate_json(os.environ[SETTINGS]));"
        f"supervise(pool, job(pathlib.Path({str(tmp_path)!r}), pause_s=20), Watch())"
    )
    flow = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY)
    attempt = tmp_path / "jobs" / "toy" / "001"
    deadline = time.monotonic() + 60
    while not (attempt / "handle.json").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    wait_for(pool, str(attempt), "rank 0 sees the sum", limit_s=300)
    flow.kill()
    flow.wait()
    assert supervise(pool, job(tmp_path, pause_s=20), Watch())["sum"] == 3
    assert attempts(tmp_path) == ["001"]


def test_the_end_is_read_from_what_is_left_when_the_job_was_collected(pool, tmp_path):
    handle = pool.submit(job(tmp_path))
    deadline = time.monotonic() + 300
    # Nobody asks for its state until it is gone, as a flow that was away for longer than keep_finished_s.
    while (
        not all((Path(handle) / f"node-{node}.exit.json").exists() for node in (0, 1)) and time.monotonic() < deadline
    ):
        time.sleep(0.5)
    codes = [json.loads((Path(handle) / f"node-{node}.exit.json").read_text())["exit_code"] for node in (0, 1)]
    assert codes == [0, 0]
    there = objects(handle)
    while not any(c["type"] == "Complete" for c in there.job()["status"].get("conditions", [])):
        time.sleep(0.5)
    there.delete_job(there.job())
    while there.job() is not None:
        time.sleep(0.5)
    assert pool.state(handle) is JobState.SUCCEEDED


class TestKubernetesPool(AnyPool):
    """What every pool must do."""
