"""The Kubernetes pool against an emulated API over real HTTP, whose answers are scripted."""

import json
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from tasks.contracts.files import write_json
from tasks.contracts.job import FailureKind, JobFailed, JobState
from tasks.contracts.kubernetes_settings import KubernetesSettings
from tasks.pool import kubernetes, kubernetes_api
from tasks.pool.kubernetes import KubernetesPool
from tasks.pool.supervise import Watch, supervise
from tests.pool.any_pool import job
from tests.pool.emulated_cluster import (
    WORKLOADS,
    ago,
    bodies,
    refuse,
    running_cluster,
)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    kubeconfig = tmp_path / "kubeconfig"
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    monkeypatch.setattr(kubernetes_api, "WAITS_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr(kubernetes, "POLL_S", 0.05)
    monkeypatch.setattr(kubernetes, "PODS_POLL_S", 0)
    with running_cluster(kubeconfig) as cluster:
        yield cluster
        kubernetes_api.open_api(None).close()


@pytest.fixture
def pool(tmp_path):
    volume = {"mount_path": str(tmp_path), "host_path": str(tmp_path)}
    return KubernetesPool(KubernetesSettings(namespace="team", image="proving-ground", volumes=(volume,)))


def finish(handle, *codes: int) -> None:
    """What the nodes leave."""
    for node, code in enumerate(codes):
        write_json(Path(handle) / f"node-{node}.exit.json", {"exit_code": code, "host": "gpu"})
    if not any(codes):
        write_json(Path(handle) / "result.json", {"sum": 3})


def outcome(handle) -> dict:
    return json.loads((Path(handle) / "exit.json").read_text())


# Where it stands.


def test_a_job_goes_from_queued_over_pulling_to_running_and_complete(pool, cluster, tmp_path):
    handle = pool.submit(job(tmp_path))
    assert pool.state(handle) is JobState.QUEUED
    pods = [cluster.pod(i, {"phase": "Pending", "containerStatuses": [
        {"state": {"waiting": {"reason": "ContainerCreating"}}}]}) for i in range(2)]  # fmt: skip
    cluster.event(pods[0], "Pulling", 'Pulling image "proving-ground"')
    assert pool.state(handle) is JobState.QUEUED
    assert 'Pulling: Pulling image "proving-ground"' in pool.explain(handle)
    cluster.change(cluster.job, active=2, ready=1)
    assert pool.state(handle) is JobState.QUEUED
    cluster.change(cluster.job, active=2, ready=2)
    assert pool.state(handle) is JobState.RUNNING
    assert pool.explain(handle) is None
    # A node that has ended is not ready any more: that is no waiting.
    cluster.change(cluster.job, active=1, ready=1)
    assert pool.state(handle) is JobState.RUNNING
    # All pods are through, and the Job is still counting: not yet.
    finish(handle, 0, 0)
    cluster.end("SuccessCriteriaMet", active=0, ready=0)
    assert pool.state(handle) is JobState.RUNNING
    cluster.end("Complete")
    assert pool.state(handle) is JobState.SUCCEEDED
    assert pool.error(handle) is None


def test_failure_target_is_not_yet_the_end(pool, cluster, tmp_path):
    handle = pool.submit(job(tmp_path))
    cluster.end("FailureTarget", "PodFailurePolicy", "Container ranks for pod team/x failed with exit code 1")
    assert pool.state(handle) is JobState.RUNNING
    cluster.end(
        "Failed", "PodFailurePolicy", "Container ranks for pod team/x failed with exit code 1 matching FailJob rule"
    )
    assert pool.state(handle) is JobState.FAILED
    assert "failed with exit code 1 matching" in pool.error(handle).summary


def test_a_job_that_kueue_holds_is_queued_and_says_why(pool, cluster, tmp_path):
    held = KubernetesPool(pool._settings.model_copy(update={"queue": "team-queue"}))
    handle = held.submit(job(tmp_path))
    assert cluster.job["spec"]["suspend"] is True
    assert cluster.job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-queue"
    assert held.state(handle) is JobState.QUEUED
    assert held.explain(handle) == "suspended, and not yet admitted to its queue"
    message = "couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu, 8 more needed"
    pending = {"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": message}
    labels = {"kueue.x-k8s.io/job-uid": cluster.job["metadata"]["uid"]}
    cluster.put(WORKLOADS, "job-1", {"metadata": {"labels": labels}, "status": {"conditions": [pending]}})
    assert held.explain(handle) == f"Pending: {message}"
    # Admitted, running, and sent back into the queue by a job of more weight.
    cluster.job["spec"]["suspend"] = False
    cluster.change(cluster.job, ready=2)
    assert held.state(handle) is JobState.RUNNING
    cluster.job["spec"]["suspend"] = True
    cluster.change(cluster.job, ready=0)
    assert held.state(handle) is JobState.QUEUED


@pytest.mark.parametrize(
    ("pod", "event", "said"),
    [
        ({"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
          "message": "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."}]}, None,
         "Unschedulable: 0/2 nodes are available: 2 Insufficient nvidia.com/gpu."),
        ({"phase": "Pending"}, ("FailedMount", 'MountVolume.SetUp failed for volume "volume-0": claim is lost'),
         'FailedMount: MountVolume.SetUp failed for volume "volume-0": claim is lost'),
        (None, ("FailedCreate", "pods is forbidden: exceeded quota: team, requested: requests.nvidia.com/gpu=8"),
         "FailedCreate: pods is forbidden: exceeded quota: team, requested: requests.nvidia.com/gpu=8"),
    ],
)  # fmt: skip
def test_what_a_job_waits_for_is_told_in_the_clusters_words(pool, cluster, tmp_path, pod, event, said):
    handle = pool.submit(job(tmp_path))
    about = cluster.job if pod is None else cluster.pod(0, pod)
    if event:
        cluster.event(about, *event)
    assert pool.state(handle) is JobState.QUEUED
    assert pool.explain(handle).endswith(said)


def test_what_may_not_be_read_is_not_told_and_fails_nothing(pool, cluster, tmp_path):
    handle = pool.submit(job(tmp_path))
    cluster.pod(0, {"phase": "Pending"})
    cluster.faults += [("GET", "/events", refuse(403, 'events is forbidden: User "x" cannot list'))] * 2
    assert "no reason given" in pool.explain(handle)


def test_a_job_that_waits_too_long_is_withdrawn_with_the_clusters_reason(pool, cluster, tmp_path):
    told: list[str] = []

    def schedule() -> None:
        while cluster.find("jobs") is None:
            time.sleep(0.02)
        reason = {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/1 nodes are available",
        }
        pod = cluster.pod(0, {"phase": "Pending", "conditions": [reason]})
        while cluster.find("jobs") is not None:
            time.sleep(0.02)
        cluster.remove("v1/pods", pod["metadata"]["name"])

    thread = threading.Thread(target=schedule)
    thread.start()
    with pytest.raises(JobFailed, match=r"still queued after .* \(Unschedulable: 0/1 nodes are available"):
        supervise(pool, job(tmp_path, num_nodes=3, queue_limit_s=3), Watch(on_waiting=told.append))
    thread.join()
    assert any("0/1 nodes" in reason for reason in told)
    assert cluster.names("jobs") == []


# How it ends.


def test_an_evicted_pod_is_a_preemption_though_its_peers_failed_of_it(pool, cluster, tmp_path):
    handle = pool.submit(job(tmp_path))
    cluster.change(cluster.job, ready=2)
    assert pool.state(handle) is JobState.RUNNING
    gone = {
        "type": "DisruptionTarget",
        "status": "True",
        "reason": "EvictionByEvictionAPI",
        "message": "Eviction API: evicting",
    }
    pod = cluster.pod(1, {"phase": "Running", "conditions": [gone]}, deletionTimestamp=ago(-60))
    cluster.change(cluster.job, ready=1, terminating=1)
    assert pool.state(handle) is JobState.RUNNING
    # The pod is gone before the Job has ended, and what the Job says is of the peer.
    cluster.remove("v1/pods", pod["metadata"]["name"])
    cluster.end(
        "Failed", "PodFailurePolicy", "Container ranks for pod team/x-0 failed with exit code 1 matching FailJob rule"
    )
    assert pool.state(handle) is JobState.PREEMPTED
    assert "EvictionByEvictionAPI: Eviction API: evicting" in pool.error(handle).summary


def test_a_lost_node_is_a_preemption_though_its_pod_never_ends(pool, cluster, tmp_path):
    handle = pool.submit(job(tmp_path))
    cluster.change(cluster.job, ready=2)
    assert pool.state(handle) is JobState.RUNNING
    taint = {
        "type": "DisruptionTarget",
        "status": "True",
        "reason": "DeletionByTaintManager",
        "message": "Taint manager",
    }
    status = {"phase": "Running", "conditions": [taint]}
    pod = cluster.pod(1, status, deletionTimestamp=ago(-30), finalizers=["batch.kubernetes.io/job-tracking"])
    cluster.change(cluster.job, ready=1, terminating=1)
    assert pool.state(handle) is JobState.RUNNING
    cluster.objects["v1/pods", "team", pod["metadata"]["name"]].patch({"metadata": {"deletionTimestamp": ago(31)}})
    assert pool.state(handle) is JobState.PREEMPTED
    assert "its node on gpu-1 does not answer" in pool.error(handle).summary
    assert pool.error(handle).kind is FailureKind.LOST
    # Nobody there will end it: it is taken out by force, or its name would be held for ever.
    threading.Timer(0.5, cluster.remove, ("v1/pods", pod["metadata"]["name"])).start()
    pool.cancel(handle)
    assert bodies(cluster, "DELETE")[-1]["gracePeriodSeconds"] == 0


def test_a_pod_that_still_saves_is_not_lost_to_a_clock_here_that_is_ahead(pool, cluster, tmp_path):
    cluster.behind = timedelta(minutes=5)
    handle = pool.submit(job(tmp_path))
    # Just told to leave, with two minutes to do so.
    pod = cluster.pod(1, {"phase": "Running"}, deletionTimestamp=ago(300 - 120), finalizers=["held"])
    cluster.change(cluster.job, ready=1, terminating=1)
    assert not pool.state(handle).is_final
    # Its Job is gone, and it runs.
    cluster.remove("batch/v1/jobs", cluster.job["metadata"]["name"])
    assert pool.state(handle) is JobState.RUNNING
    threading.Timer(0.5, cluster.remove, ("v1/pods", pod["metadata"]["name"])).start()
    pool.cancel(handle)
    assert not any(path.startswith("/api/v1/") and method == "DELETE" for method, path in cluster.seen)


def test_ranks_that_left_on_request_are_a_preemption(pool, cluster, tmp_path):
    handle = pool.submit(job(tmp_path))
    message = "Container ranks for pod team/x-0 failed with exit code 75 matching FailJob rule at index 1"
    cluster.end("Failed", "PodFailurePolicy", message)
    assert pool.state(handle) is JobState.PREEMPTED


def test_a_job_beyond_its_time_limit_has_failed_though_its_ranks_left_on_request(pool, cluster, tmp_path):
    handle = pool.submit(job(tmp_path))
    message = "Container ranks for pod team/x-0 failed with exit code 75 matching FailJob rule at index 1"
    cluster.pod(0, {"phase": "Failed", "reason": "DeadlineExceeded", "message": "Pod was active on the node longer"})
    cluster.end("Failed", "PodFailurePolicy", message)
    assert pool.state(handle) is JobState.FAILED
    assert "raise pool.time_limit_minutes" in pool.error(handle).summary
    assert pool.error(handle).kind is FailureKind.USER


def test_a_rank_that_ran_out_of_memory_says_so(pool, cluster, tmp_path):
    handle = pool.submit(job(tmp_path))
    # Its peer, who lost it, is the only one to leave an error.
    lost = {"rank": 0, "exit_code": 1, "time": 1, "message": "RuntimeError: Connection closed by peer", "traceback": ""}
    write_json(Path(handle) / "node-0.failures.json", [lost])
    ended = {"exitCode": 137, "reason": "OOMKilled"}
    cluster.pod(1, {"phase": "Failed", "containerStatuses": [{"state": {"terminated": ended}}]})
    cluster.end("Failed", "PodFailurePolicy", "Container ranks for pod team/x-1 failed with exit code 137")
    assert pool.state(handle) is JobState.FAILED
    error = pool.error(handle)
    assert "on gpu-1: OOMKilled (exit code 137)" in error.summary
    assert "raise pool.kubernetes.memory_per_node" in error.summary
    assert error.kind is FailureKind.USER


def test_the_log_of_a_pod_that_never_got_to_our_code_is_kept_as_its_nodes(pool, cluster, tmp_path):
    handle = pool.submit(job(tmp_path))
    for node, message in enumerate(["python: No module named tasks", ""]):
        ended = {"exitCode": 1, "reason": "Error", "message": message}
        pod = cluster.pod(node, {"phase": "Failed", "containerStatuses": [{"state": {"terminated": ended}}]})
        if not message:
            cluster[f"get /api/v1/namespaces/team/pods/{pod['metadata']['name']}/log"] << b"exec: no such file\n"
    cluster.end("Failed", "PodFailurePolicy", "failed with exit code 1")
    assert pool.state(handle) is JobState.FAILED
    lines = {(line.node, line.text) for line in pool.error(handle).last_lines}
    assert {(0, "python: No module named tasks"), (1, "exec: no such file")} <= lines


def test_an_image_that_is_not_there_fails_the_job_in_the_kubelets_words(pool, cluster, tmp_path, monkeypatch):
    handle = pool.submit(job(tmp_path))
    waiting = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "proving-ground": not found'}
    cluster.pod(0, {"phase": "Pending", "containerStatuses": [{"state": {"waiting": waiting}}]})
    # A registry may be away for a moment.
    assert pool.state(handle) is JobState.QUEUED
    assert "ImagePullBackOff" in pool.explain(handle)
    monkeypatch.setattr(kubernetes, "CANNOT_START_LIMIT_S", -1)
    assert pool.state(handle) is JobState.FAILED
    assert 'Back-off pulling image "proving-ground": not found' in pool.error(handle).summary


def test_a_complete_job_without_a_result_is_no_success_but_storage_may_lag(pool, cluster, tmp_path, monkeypatch):
    handle = pool.submit(job(tmp_path))
    cluster.end("Complete")
    assert pool.state(handle) is JobState.RUNNING
    monkeypatch.setattr(kubernetes, "STORAGE_LAG_S", -1)
    assert pool.state(handle) is JobState.FAILED
    assert "none left a result" in pool.error(handle).summary


@pytest.mark.parametrize(
    ("codes", "state"),
    [((0, 0), "succeeded"), ((0, 1), "failed"), ((75, 0), "preempted"), ((0,), "cancelled"), ((), "cancelled")],
)
def test_a_job_that_is_gone_is_judged_by_what_every_node_left(pool, cluster, tmp_path, codes, state):
    handle = pool.submit(job(tmp_path))
    if codes:
        finish(handle, *codes)
    cluster.remove("batch/v1/jobs", cluster.job["metadata"]["name"])
    assert KubernetesPool(pool._settings).state(handle) is JobState(state)


def test_the_end_can_be_read_when_job_and_cluster_are_gone(pool, cluster, tmp_path):
    handle = pool.submit(job(tmp_path))
    cluster.end("Failed", "PodFailurePolicy", "failed with exit code 1")
    assert pool.state(handle) is JobState.FAILED
    num_asked = len(cluster.seen)
    other = KubernetesPool(pool._settings.model_copy(update={"context": "another-cluster"}))
    assert other.state(handle) is JobState.FAILED
    assert "failed with exit code 1" in other.error(handle).summary
    assert len(cluster.seen) == num_asked
