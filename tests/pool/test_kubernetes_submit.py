"""Submitting to and cancelling on the emulated API: one job whatever goes wrong, and nothing half made is left."""

import asyncio
import dataclasses
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks.contracts.job import JobState, PoolError
from tasks.pool import kubernetes
from tasks.pool.kubernetes import KubernetesPool
from tests.pool.any_pool import attempts, job
from tests.pool.emulated_cluster import bodies, do_and_hang_up, drop_mid_answer, refuse
from tests.pool.test_kubernetes import cluster, finish, outcome, pool  # noqa: F401 - two of them are fixtures

# Submitting.


def test_fifty_submits_of_one_name_are_one_job(pool, cluster, tmp_path):
    pools = [KubernetesPool(pool._settings) for _ in range(50)]
    with ThreadPoolExecutor(50) as executor:
        handles = set(executor.map(lambda each: each.submit(job(tmp_path)), pools))
    assert len(handles) == 1
    assert attempts(tmp_path) == ["001"]
    assert len(cluster.names("jobs")) == len(cluster.names("services")) == 1


def test_an_answer_that_is_lost_makes_no_second_job(pool, cluster, tmp_path):
    cluster.faults.append(("POST", "/jobs", do_and_hang_up))
    handle = pool.submit(job(tmp_path))
    assert cluster.names("jobs") == [json.loads((Path(handle) / "handle.json").read_text())["job"]]
    assert [method for method, path in cluster.seen if path.endswith("/jobs")] == ["POST", "POST"]


def test_a_job_of_that_name_that_is_not_ours_is_left_alone(pool, cluster, tmp_path):
    first = pool.submit(job(tmp_path))
    name = cluster.job["metadata"]["name"]
    cluster.job["metadata"]["labels"]["proving-ground/attempt"] = "another"
    # The attempt is new here, and its name is taken.
    for path in sorted(Path(first).iterdir(), reverse=True):
        path.unlink()
    Path(first).rmdir()
    with pytest.raises(PoolError, match=f"a Job {name} is in namespace team already and is not this attempt's"):
        pool.submit(job(tmp_path))
    assert cluster.names("jobs") == [name]
    # What is not ours is not cancelled either.
    pool.cancel(first)
    assert cluster.names("jobs") == [name]


def test_a_service_that_cannot_be_made_leaves_no_job(pool, cluster, tmp_path):
    cluster.faults.append(("POST", "/services", refuse(403, 'services is forbidden: User "flow" cannot create')))
    with pytest.raises(PoolError, match=r'User "flow" cannot create.*infra/kubernetes/training-pool'):
        pool.submit(job(tmp_path))
    assert cluster.names("jobs") == cluster.names("services") == []


def test_a_flow_that_died_between_job_and_service_is_made_whole_by_the_next(pool, cluster, tmp_path):
    handle = pool.submit(job(tmp_path))
    (service,) = cluster.names("services")
    owner = cluster.find("services", service)["metadata"]["ownerReferences"][0]
    assert owner["uid"] == cluster.job["metadata"]["uid"]
    cluster.remove("v1/services", service)
    assert KubernetesPool(pool._settings).submit(job(tmp_path)) == handle
    assert cluster.names("services") == [service]


@pytest.mark.parametrize(
    ("status", "message", "said"),
    [
        (401, "Unauthorized", r"Unauthorized; the credentials of .* have expired .* log in again"),
        (403, 'jobs.batch is forbidden: User "flow" cannot create resource "jobs" in API group "batch"',
         r'User "flow" cannot create resource "jobs".*infra/kubernetes/training-pool has a role'),
        (404, 'namespaces "team" not found', r'namespaces "team" not found; make it .* or set pool\.kubernetes\.namespace'),
        (422, "Job.batch is invalid: spec.template: Required value", "spec.template: Required value"),
    ],
)  # fmt: skip
def test_a_refusal_is_quoted_with_what_to_do_and_makes_no_storm(pool, cluster, tmp_path, status, message, said):
    cluster.faults += [("POST", "/jobs", refuse(status, message))] * 10
    with pytest.raises(PoolError, match=said):
        pool.submit(job(tmp_path))
    # Credentials are read once more: they may have been renewed.
    assert len(cluster.seen) == (2 if status == 401 else 1)
    cluster.faults.clear()
    assert cluster.names("jobs") == cluster.names("services") == []
    again = pool.submit(job(tmp_path))
    assert Path(again).name == "002"


@pytest.mark.parametrize(
    "fault", [refuse(429, "busy"), refuse(500, "etcd"), refuse(503, ""), drop_mid_answer, do_and_hang_up]
)
def test_a_momentary_fault_is_waited_out(pool, cluster, tmp_path, fault):
    cluster.faults += [("POST", "/jobs", fault), ("POST", "/services", fault)]
    handle = pool.submit(job(tmp_path))
    cluster.faults += [("GET", "/jobs/", fault)] * 3
    assert pool.state(handle) is JobState.QUEUED
    assert cluster.faults == []


def test_a_list_that_is_too_old_is_asked_for_again(pool, cluster, tmp_path):
    handle = pool.submit(job(tmp_path))
    cluster.faults.append(("GET", "/pods", refuse(410, "Expired: too old resource version")))
    assert pool.state(handle) is JobState.QUEUED
    assert cluster.faults == []


@pytest.mark.parametrize("fault", [refuse(401, "Unauthorized"), refuse(500, "etcd is away"), drop_mid_answer])
def test_an_api_that_does_not_answer_is_unknown_and_doubles_nothing(pool, cluster, tmp_path, fault):
    handle = pool.submit(job(tmp_path))
    cluster.faults += [("GET", "/jobs/", fault)] * 12
    assert pool.state(handle) is JobState.UNKNOWN
    assert not (Path(handle) / "exit.json").exists()
    with pytest.raises(PoolError, match="may still run and"):
        pool.submit(job(tmp_path))
    cluster.faults.clear()
    assert attempts(tmp_path) == ["001"]
    assert pool.state(handle) is JobState.QUEUED


def test_a_submission_whose_outcome_is_unknown_is_cleared_up_by_the_next(pool, cluster, tmp_path):
    cluster.faults += [("POST", "/jobs", do_and_hang_up), *[("POST", "/jobs", drop_mid_answer)] * 3]
    with pytest.raises(PoolError, match="does not answer POST"):
        pool.submit(job(tmp_path))
    # It was made after all, and is adopted with its Service.
    handle = pool.submit(job(tmp_path))
    assert Path(handle).name == "001"
    assert len(cluster.names("jobs")) == len(cluster.names("services")) == 1


def test_looking_at_a_job_whose_submission_is_under_way_does_not_end_it(pool, cluster, tmp_path):
    looker, seen = KubernetesPool(pool._settings), []

    async def look_first(raw, go_on):
        handle = str(tmp_path / "jobs" / "toy" / "001")
        seen.append(await asyncio.to_thread(looker.state, handle))
        record = Path(handle, "handle.json")
        record.rename(record.with_name("later"))
        seen.append(await asyncio.to_thread(looker.state, handle))
        record.with_name("later").rename(record)
        return await go_on()

    cluster.faults.append(("POST", "/jobs", look_first))
    handle = pool.submit(job(tmp_path))
    assert seen == [JobState.UNKNOWN, JobState.UNKNOWN]
    assert pool.state(handle) is looker.state(handle) is JobState.QUEUED


@pytest.mark.parametrize("had_recorded", [False, True])
def test_a_submission_that_died_before_its_job_was_made_is_replaced_by_the_next(pool, cluster, tmp_path, had_recorded):
    cluster.faults += [("POST", "/jobs", drop_mid_answer)] * 4
    with pytest.raises(PoolError, match="does not answer POST"):
        pool.submit(job(tmp_path))
    first = tmp_path / "jobs" / "toy" / "001"
    if not had_recorded:
        (first / "handle.json").unlink()
    assert pool.state(str(first)) is JobState.UNKNOWN
    assert "cut short" in pool.explain(str(first))
    assert Path(pool.submit(job(tmp_path))).name == "002"
    assert pool.state(str(first)) is JobState.FAILED
    assert len(cluster.names("jobs")) == 1


def test_a_cancellation_waits_for_the_submission_and_then_ends_what_it_made(pool, cluster, tmp_path):
    other, handle = KubernetesPool(pool._settings), str(tmp_path / "jobs" / "toy" / "001")
    cancelling = threading.Thread(target=other.cancel, args=(handle,))

    async def cancel_first(raw, go_on):
        cancelling.start()
        await asyncio.sleep(0.3)
        return await go_on()

    cluster.faults.append(("POST", "/jobs", cancel_first))
    pool.submit(job(tmp_path))
    cancelling.join()
    assert cluster.names("jobs") == []
    assert pool.state(handle) is JobState.CANCELLED


def test_without_a_cluster_it_says_what_is_missing(pool, tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(PoolError, match=r"no cluster to ask: .*KUBECONFIG"):
        pool.submit(job(tmp_path))


def test_a_context_that_is_not_there_is_named(pool, cluster, tmp_path):
    elsewhere = KubernetesPool(pool._settings.model_copy(update={"context": "nowhere"}))
    with pytest.raises(PoolError, match=r"no cluster to ask: .*nowhere"):
        elsewhere.submit(job(tmp_path))


def test_a_folder_that_the_pods_do_not_see_is_refused_before_it_is_an_attempt(pool, cluster, tmp_path):
    with pytest.raises(ValueError, match="log folder /var/logs-elsewhere is on no shared volume"):
        pool.submit(dataclasses.replace(job(tmp_path), log_folder="/var/logs-elsewhere"))
    assert attempts(tmp_path) == []
    assert cluster.seen == []


def test_environment_with_line_breaks_and_dollars_arrives_as_it_is(pool, cluster, tmp_path):
    pool.submit(dataclasses.replace(job(tmp_path), env={"ODD": "a\nb\t'\"${x}"}))
    env = {e["name"]: e.get("value") for e in cluster.job["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env["ODD"].replace("$$", "$") == "a\nb\t'\"${x}"


# Cancelling.


def test_cancel_returns_when_job_and_pods_are_gone(pool, cluster, tmp_path):
    handle = pool.submit(job(tmp_path))
    cluster.job["metadata"]["finalizers"] = ["foregroundDeletion"]
    pod = cluster.pod(0, {"phase": "Running"})
    gone = threading.Event()

    def collect() -> None:
        time.sleep(1)
        cluster.remove("batch/v1/jobs", cluster.job["metadata"]["name"])
        time.sleep(0.5)
        gone.set()
        cluster.remove("v1/pods", pod["metadata"]["name"])

    threading.Thread(target=collect).start()
    pool.cancel(handle)
    assert gone.is_set()
    (body,) = bodies(cluster, "DELETE")
    assert body["propagationPolicy"] == "Foreground"
    assert pool.state(handle) is JobState.CANCELLED


def test_a_job_that_has_failed_stays_for_kubectl_when_its_flow_clears_up(pool, cluster, tmp_path):
    handle = pool.submit(job(tmp_path))
    pod = cluster.pod(0, {"phase": "Failed"})
    cluster.end("Failed", "PodFailurePolicy", "failed with exit code 1")
    assert pool.state(handle) is JobState.FAILED
    pool.cancel(handle)
    assert [cluster.job["metadata"]["name"]] == cluster.names("jobs")
    # What still runs of it is ended all the same.
    cluster.objects["v1/pods", "team", pod["metadata"]["name"]].patch({"status": {"phase": "Running"}})
    threading.Timer(0.5, cluster.remove, ("v1/pods", pod["metadata"]["name"])).start()
    pool.cancel(handle)
    assert cluster.names("jobs") == []


def test_cancel_says_what_is_still_there_when_it_gives_up(pool, cluster, tmp_path, monkeypatch):
    handle = pool.submit(job(tmp_path))
    cluster.pod(0, {"phase": "Running"})
    monkeypatch.setattr(kubernetes, "CANCEL_MARGIN_S", -120 + 0.3)
    with pytest.raises(PoolError, match=r"still there .* kubectl -n team get pods -l proving-ground/attempt="):
        pool.cancel(handle)
    # The Job is gone, and what it was to take along is not.
    assert pool.state(handle) is JobState.RUNNING


def test_a_job_that_somebody_deletes_is_cancelled_and_not_a_preemption_to_go_on_with(pool, cluster, tmp_path):
    handle = pool.submit(job(tmp_path))
    cluster.change(cluster.job, ready=2)
    assert pool.state(handle) is JobState.RUNNING
    pods = [cluster.pod(node, {"phase": "Running"}) for node in range(2)]
    # As `kubectl delete job` does it: the Job is gone at once, its pods leave on request.
    cluster.remove("batch/v1/jobs", cluster.job["metadata"]["name"])
    assert pool.state(handle) is JobState.RUNNING
    finish(handle, 75, 75)
    for pod in pods:
        cluster.remove("v1/pods", pod["metadata"]["name"])
    assert pool.state(handle) is JobState.CANCELLED
    assert "was deleted while it ran" in pool.error(handle).summary


def test_ranks_that_leave_because_of_a_cancellation_do_not_make_it_a_preemption(pool, cluster, tmp_path):
    handle = pool.submit(job(tmp_path))
    cluster.job["metadata"]["finalizers"] = ["foregroundDeletion"]
    other = KubernetesPool(pool._settings)
    states = []

    def end() -> None:
        while not cluster.job["metadata"].get("deletionTimestamp"):
            time.sleep(0.02)
        states.append(other.state(handle))
        cluster.end("Failed", "PodFailurePolicy", "Container ranks failed with exit code 75 matching FailJob rule")
        states.append(other.state(handle))
        cluster.remove("batch/v1/jobs", cluster.job["metadata"]["name"])

    thread = threading.Thread(target=end)
    thread.start()
    pool.cancel(handle)
    thread.join()
    assert states == [JobState.RUNNING, JobState.CANCELLED]
    assert pool.state(handle) is JobState.CANCELLED


def test_an_ended_job_is_not_asked_about_again(pool, cluster, tmp_path):
    handle = pool.submit(job(tmp_path))
    finish(handle, 0, 0)
    cluster.end("Complete")
    assert pool.state(handle) is JobState.SUCCEEDED
    num_asked = len(cluster.seen)
    assert pool.submit(job(tmp_path)) == handle
    assert [line for line in pool.logs(handle) if line] == []
    assert len(cluster.seen) == num_asked
    assert outcome(handle) == {"state": "succeeded", "reason": ""}
