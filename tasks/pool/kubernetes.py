"""The pool that is a Kubernetes cluster: one Indexed Job per attempt, found again by its name and the token it carries.

State is what ``exit.json`` says, else the Job's own word. Nobody in the pods writes ``exit.json``: the first process that sees
the Job end does, with the reason, so that both can be read when the Job is long gone. A Job that is gone before anybody saw it
end is judged by what every node left. An API that does not answer is UNKNOWN, which is neither success nor failure.

Jobs are asked for and not watched: one small read a second cannot miss a change, where a watch must be resumed after every
broken connection and every 410 with a list, and would still have to be checked against one. Pods are only listed while
not all of them run.
"""

import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from tasks.contracts.files import read_json, write_json, write_text
from tasks.contracts.job import JobError, JobHandle, JobSpec, JobState, LogLine, PoolError
from tasks.contracts.kubernetes_settings import KubernetesSettings
from tasks.pool.attempts import begin_attempt, follow, job_error, log_paths, newest_attempt, submitting
from tasks.pool.kubernetes_api import ApiError, KubernetesApi, Unreachable, open_api, path_of
from tasks.pool.kubernetes_objects import CONTAINER, LEFT_EXIT_CODE, TOKEN, render_job, render_service
from tasks.pool.kubernetes_pod import exit_codes
from tasks.pool.kubernetes_status import (
    all_ready,
    cannot_start,
    disruption,
    index_of,
    is_late,
    is_overdue,
    is_running,
    last_words,
    state_of,
    why_ended,
    why_waiting,
)

Object = dict[str, Any]

POLL_S = 1.0
PODS_POLL_S = 5.0
CANCEL_MARGIN_S = 120
"""Beyond the pods' own grace period."""
STORAGE_LAG_S = 60
"""Longer than the attribute cache of NFS keeps (acdirmax)."""
CANNOT_START_LIMIT_S = 180
"""An image that cannot be pulled for so long is taken to be not there."""
NUM_LAST_LINES = 15


class KubernetesPool:
    """Jobs on Kubernetes. Implements :class:`tasks.contracts.job.Pool`; the handle is the attempt's folder.

    May be used from several threads.
    """

    def __init__(self, settings: KubernetesSettings) -> None:
        self._settings = settings
        # What this process saw first when, in monotonic seconds; a process that takes over begins to count anew.
        self._completed: dict[JobHandle, float] = {}
        self._stuck: dict[JobHandle, float] = {}
        self._pods_seen: dict[JobHandle, float] = {}
        self._ran: set[JobHandle] = set()

    @property
    def _api(self) -> KubernetesApi:
        return open_api(self._settings.context)

    def submit(self, job: JobSpec) -> JobHandle:
        folder = Path(job.folder)
        with submitting(folder):
            newest = newest_attempt(folder)
            if newest is not None:
                handle = JobHandle(str(newest))
                state = self.state(handle)
                if state is JobState.UNKNOWN:
                    raise PoolError(f"job {job.name}: {newest} may still run and {self._why_unknown(newest)}")
                if state in (JobState.QUEUED, JobState.RUNNING):
                    self._finish_submission(newest)
                if state in (JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED):
                    return handle
                self.cancel(handle)
            return self._begin(job, newest)

    def _begin(self, job: JobSpec, newest: Path | None) -> JobHandle:
        token = uuid.uuid4().hex[:12]
        # A job that cannot be is refused before it becomes an attempt.
        render_job(job, Path(job.folder) / "000", token, self._settings)
        attempt = begin_attempt(job, newest)
        log_paths(job, attempt)
        rendered = render_job(job, attempt, token, self._settings)
        meta = rendered["metadata"]
        # On disk before anything is made: whatever happens then, the Job can be found by them.
        write_text(attempt / "job.yaml", yaml.safe_dump(rendered, sort_keys=False))
        write_json(attempt / "handle.json", {"namespace": meta["namespace"], "job": meta["name"], "token": token})
        try:
            self._create(rendered, token)
        except Unreachable:
            # It may have been made: nothing is said of its end, and the next submission looks.
            raise
        except PoolError as error:
            _conclude(attempt, JobState.FAILED, str(error))
            raise
        return JobHandle(str(attempt))

    def _create(self, rendered: Object, token: str) -> None:
        """The Job and then its Service, which belongs to it from the start: nothing half made can stay."""
        namespace, name = rendered["metadata"]["namespace"], rendered["metadata"]["name"]
        try:
            made = self._api.request("POST", path_of("batch/v1", namespace, "jobs"), body=rendered)
        except ApiError as error:
            if error.status != 409:
                raise
            # An answer that was lost on its way, and the request was sent again; or somebody else's.
            made = self._api.request("GET", path_of("batch/v1", namespace, "jobs", name))
            if made["metadata"].get("labels", {}).get(TOKEN) != token:
                raise PoolError(
                    f"a Job {name} is in namespace {namespace} already and is not this attempt's (label {TOKEN}): "
                    "another installation has the same storage path; use another namespace, or delete that Job"
                ) from error
        try:
            self._create_service(rendered, made["metadata"]["uid"])
        except ApiError:
            self._delete_job(namespace, name, made["metadata"]["uid"])
            raise

    def _create_service(self, rendered: Object, uid: str) -> None:
        service = render_service(rendered, uid)
        try:
            self._api.request("POST", path_of("v1", service["metadata"]["namespace"], "services"), body=service)
        except ApiError as error:
            if error.status != 409:
                raise

    def _finish_submission(self, attempt: Path) -> None:
        """Make the Service of a Job whose maker died, or lost the API, in between."""
        if (job := self._job(attempt)) is not None:
            self._create_service(yaml.safe_load((attempt / "job.yaml").read_text()), job["metadata"]["uid"])

    def state(self, job: JobHandle) -> JobState:
        attempt = Path(job)
        if (ended := _left_behind(attempt)) is not None:
            return ended
        try:
            found = self._job(attempt)
            if found is None:
                return self._judge_by_what_is_left(attempt)
            state = self._follow_up(job, found)
        except PoolError:
            return JobState.UNKNOWN
        return state

    def _follow_up(self, handle: JobHandle, job: Object) -> JobState:
        """The state, with the pods looked at where the Job alone does not tell, and kept once it is final."""
        attempt, now = Path(handle), datetime.now(UTC)
        state = state_of(job, [], now)
        pods: list[Object] = []
        has_ended_badly = state.is_final and state is not JobState.SUCCEEDED
        if has_ended_badly or (not state.is_final and self._should_look_at_pods(handle, job)):
            pods = self._pods(attempt)
            self._note_disruption(attempt, job, pods)
            state = state_of(job, pods, now)
        if state is JobState.FAILED and not is_late(pods) and (attempt / "disrupted.txt").exists():
            state = JobState.PREEMPTED
        if state is JobState.SUCCEEDED:
            return self._succeeded(handle)
        if state.is_final:
            return self._end(attempt, state, why_ended(job, pods, now), pods)
        problem = cannot_start(pods)
        if pods and problem is None:
            self._stuck.pop(handle, None)
        elif problem is not None:
            since = self._stuck.setdefault(handle, time.monotonic())
            if time.monotonic() - since > CANNOT_START_LIMIT_S:
                waited = f"a container could not be started for {CANNOT_START_LIMIT_S} s: {problem}"
                return self._end(attempt, JobState.FAILED, waited, pods)
        if job["spec"].get("suspend"):
            self._ran.discard(handle)
        elif state is JobState.RUNNING:
            self._ran.add(handle)
        elif handle in self._ran:
            # A pod that is ending is not ready: that is no waiting.
            return JobState.RUNNING
        return state

    def _should_look_at_pods(self, handle: JobHandle, job: Object) -> bool:
        is_ending = job.get("status", {}).get("terminating") or job["metadata"].get("deletionTimestamp")
        if job["spec"].get("suspend") or (all_ready(job) and not is_ending):
            return False
        if time.monotonic() - self._pods_seen.get(handle, float("-inf")) < PODS_POLL_S:
            return False
        self._pods_seen[handle] = time.monotonic()
        return True

    def _note_disruption(self, attempt: Path, job: Object, pods: list[Object]) -> None:
        """Keep that a pod was taken away: it is soon gone, and what then fails are its peers."""
        path = attempt / "disrupted.txt"
        if (reason := disruption(job, pods)) is not None and not path.exists():
            write_text(path, reason)

    def _succeeded(self, handle: JobHandle) -> JobState:
        attempt = Path(handle)
        if (attempt / "result.json").exists():
            return self._end(attempt, JobState.SUCCEEDED, "", [])
        # Shared storage may show what a node wrote only after a while: until then nothing is said to have failed.
        seen = self._completed.setdefault(handle, time.monotonic())
        if time.monotonic() - seen <= STORAGE_LAG_S:
            return JobState.RUNNING
        return self._end(attempt, JobState.FAILED, "all ranks ended well but none left a result", [])

    def _judge_by_what_is_left(self, attempt: Path) -> JobState:
        """The Job is gone and nobody saw it end, or it was never made: every node's own exit status decides."""
        if not (attempt / "handle.json").exists():
            return _conclude(attempt, JobState.FAILED, "the submission was cut short before anything was made")
        now = datetime.now(UTC)
        if any(is_running(pod) and not is_overdue(pod, now) for pod in self._pods(attempt)):
            # Whoever deleted the Job did not wait for its pods.
            return JobState.RUNNING
        codes = exit_codes(attempt, read_json(attempt / "spec.json")["num_nodes"])
        if all(code == 0 for code in codes) and (attempt / "result.json").exists():
            return _conclude(attempt, JobState.SUCCEEDED, "")
        record = read_json(attempt / "handle.json")
        what = f"Job {record['job']} is not in namespace {record['namespace']}"
        reason = f"{what}; exit status by node: {['none' if code is None else code for code in codes]}"
        if any(code not in (None, 0, LEFT_EXIT_CODE) for code in codes):
            return _conclude(attempt, JobState.FAILED, reason)
        if LEFT_EXIT_CODE in codes:
            return _conclude(attempt, JobState.PREEMPTED, reason)
        if all(code is None for code in codes):
            reason = f"{what}: it was deleted before any node ended, or never made"
        return _conclude(attempt, JobState.CANCELLED, reason)

    def _end(self, attempt: Path, state: JobState, reason: str, pods: list[Object]) -> JobState:
        """Keep the end and, where the node's log has nothing, what its pod said."""
        for pod in pods if state is not JobState.SUCCEEDED else []:
            log = attempt / f"node-{index_of(pod)}.log"
            if not (log.exists() and log.stat().st_size):
                words = last_words(pod) or self._pod_log(pod)
                if words:
                    log.write_text(words + "\n")
        return _conclude(attempt, state, reason)

    def explain(self, job: JobHandle) -> str | None:
        attempt = Path(job)
        try:
            found = self._job(attempt)
            if found is None or (all_ready(found) and not found["spec"].get("suspend")):
                return None
            pods = [] if found["spec"].get("suspend") else self._pods(attempt)
            late = next((pod for pod in pods if pod.get("status", {}).get("phase") == "Pending"), None)
            events = self._events(found["metadata"]) + (self._events(late["metadata"]) if late else [])
            return why_waiting(found, pods, events, self._workload(found))
        except PoolError as error:
            return str(error)

    def logs(self, job: JobHandle) -> Iterator[LogLine | None]:
        asked, is_final = float("-inf"), False

        def ended() -> bool:
            nonlocal asked, is_final
            # The API is everybody's: it is asked once a second, the files more often.
            if time.monotonic() - asked >= POLL_S:
                asked, is_final = time.monotonic(), self.state(job).is_final
            return is_final

        yield from follow(Path(job), ended)

    def error(self, job: JobHandle) -> JobError | None:
        attempt = Path(job)
        state = self.state(job)
        if not state.is_final or state is JobState.SUCCEEDED:
            return None
        disrupted = attempt / "disrupted.txt"
        reason = read_json(attempt / "exit.json")["reason"] if (attempt / "exit.json").exists() else ""
        if state is JobState.PREEMPTED and disrupted.exists() and disrupted.read_text() not in reason:
            reason = f"{disrupted.read_text()}; {reason}"
        return job_error(attempt, reason or "all ranks ended well but none left a result")

    def cancel(self, job: JobHandle) -> None:
        attempt = Path(job)
        if not (attempt / "handle.json").exists():
            return
        record = read_json(attempt / "handle.json")
        limit_s = self._settings.termination_grace_s + CANCEL_MARGIN_S
        deadline = time.monotonic() + limit_s
        asked = ""
        while (found := self._job(attempt)) is not None or (pods := self._pods(attempt)):
            if found is not None and found["metadata"]["uid"] != asked:
                asked = found["metadata"]["uid"]
                self._delete_job(record["namespace"], record["job"], asked)
            now = datetime.now(UTC)
            for pod in self._pods(attempt) if found is not None else pods:
                if is_overdue(pod, now):
                    # Its node does not answer, and would hold the pod's name for ever. Should it still run, its token
                    # keeps it from writing results.
                    self._delete_pod(pod)
            if time.monotonic() > deadline:
                raise PoolError(
                    f"Job {record['job']} in namespace {record['namespace']} is still there {limit_s} s after its "
                    f"deletion was asked for; see kubectl -n {record['namespace']} get pods -l {TOKEN}={record['token']}"
                )
            time.sleep(POLL_S)
        _conclude(attempt, JobState.CANCELLED, "cancelled")

    def _delete_job(self, namespace: str, name: str, uid: str) -> None:
        body = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            # The Job stays until its pods are gone.
            "propagationPolicy": "Foreground",
            "preconditions": {"uid": uid},
        }
        self._delete(path_of("batch/v1", namespace, "jobs", name), body)

    def _delete_pod(self, pod: Object) -> None:
        meta = pod["metadata"]
        body = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "gracePeriodSeconds": 0,
            "preconditions": {"uid": meta["uid"]},
        }
        self._delete(path_of("v1", meta["namespace"], "pods", meta["name"]), body)

    def _delete(self, path: str, body: Object) -> None:
        try:
            self._api.request("DELETE", path, body=body)
        except ApiError as error:
            # Gone already, or another of that name.
            if error.status not in (404, 409):
                raise

    def _job(self, attempt: Path) -> Object | None:
        """The attempt's Job; None if there is none (another's of that name is not it)."""
        path = attempt / "handle.json"
        if not path.exists():
            return None
        record = read_json(path)
        try:
            job: Object = self._api.request("GET", path_of("batch/v1", record["namespace"], "jobs", record["job"]))
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        return job if job["metadata"].get("labels", {}).get(TOKEN) == record["token"] else None

    def _pods(self, attempt: Path) -> list[Object]:
        record = read_json(attempt / "handle.json")
        listed = self._api.request(
            "GET",
            path_of("v1", record["namespace"], "pods"),
            query={"labelSelector": f"{TOKEN}={record['token']}"},
        )
        return sorted(listed["items"], key=index_of)

    def _events(self, meta: Mapping[str, Any]) -> list[Object]:
        """Events about one object; none where they may not be read, since they only explain."""
        query = {"fieldSelector": f"involvedObject.uid={meta['uid']}"}
        try:
            listed = self._api.request("GET", path_of("v1", meta["namespace"], "events"), query=query)
        except ApiError:
            return []
        return list(listed["items"])

    def _workload(self, job: Object) -> Object | None:
        """What Kueue says of a Job in its queue; None where it cannot be asked."""
        if not job["spec"].get("suspend"):
            return None
        try:
            # Kueue's versions move: the cluster tells which it prefers.
            version = self._api.request("GET", "/apis/kueue.x-k8s.io")["preferredVersion"]["groupVersion"]
            listed = self._api.request(
                "GET",
                path_of(version, job["metadata"]["namespace"], "workloads"),
                query={"labelSelector": f"kueue.x-k8s.io/job-uid={job['metadata']['uid']}"},
            )
        except ApiError:
            return None
        return listed["items"][0] if listed["items"] else None

    def _pod_log(self, pod: Object) -> str:
        meta = pod["metadata"]
        query = {"container": CONTAINER, "tailLines": str(NUM_LAST_LINES)}
        try:
            return self._api.read(
                "GET", path_of("v1", meta["namespace"], "pods", meta["name"], "log"), query=query
            ).decode(errors="replace")
        except ApiError:
            # A container that never started has none.
            return ""

    def _why_unknown(self, attempt: Path) -> str:
        try:
            self._job(attempt)
        except PoolError as error:
            return str(error)
        return "the cluster could not be asked a moment ago; try again"


def _conclude(attempt: Path, state: JobState, reason: str) -> JobState:
    """Write down the end once; who comes later reads the first one's."""
    path = attempt / "exit.json"
    if not path.exists():
        write_json(path, {"state": state.value, "reason": reason})
    return JobState(read_json(path)["state"])


def _left_behind(attempt: Path) -> JobState | None:
    """The end that was written down."""
    path = attempt / "exit.json"
    return JobState(read_json(path)["state"]) if path.exists() else None
