"""The pool that is a Kubernetes cluster: one Indexed Job per attempt, found again by its name and the token it carries.

State is what ``exit.json`` says, else the Job's own word. Nobody in the pods writes ``exit.json``: the first process that sees
the Job end does, with the reason, so that both can be read when the Job is long gone. A Job that is gone before anybody saw it
end is judged by what every node left. An API that does not answer is UNKNOWN, which is neither success nor failure; so is a
submission that is not through, of which only the holder of the submission's lock can tell that it was cut short.

Jobs are asked for and not watched: one small read a second cannot miss a change, where a watch must be resumed after every
broken connection and every 410 with a list, and would still have to be checked against one. Pods are only listed while
not all of them run.
"""

import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.contracts.files import write_text
from tasks.contracts.job import (
    LEFT_EXIT_CODE,
    FailureKind,
    JobError,
    JobHandle,
    JobSpec,
    JobState,
    LogLine,
    MayStillRun,
    PoolError,
)
from tasks.contracts.kubernetes_settings import KubernetesSettings
from tasks.contracts.pool_settings import NetworkProfile
from tasks.pool.attempts import (
    adopted,
    begin_attempt,
    follow,
    is_ours_to_ask,
    job_error,
    log_paths,
    newest_attempt,
    outcome_of,
    read_spec,
    state_left_behind,
    submitting,
)
from tasks.pool.kubernetes_api import Unreachable, open_api
from tasks.pool.kubernetes_attempt import AttemptObjects
from tasks.pool.kubernetes_objects import TOKEN, check_reachable, render_job
from tasks.pool.kubernetes_pod import exit_codes
from tasks.pool.kubernetes_status import (
    all_ready,
    cannot_start,
    disruption,
    has_ended,
    index_of,
    is_late,
    is_overdue,
    is_running,
    last_words,
    ran_out_of_memory,
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
DISRUPTED = "disrupted.txt"
"""Of an attempt: what took a pod away."""
DELETED = "deleted.txt"
"""Of an attempt: its Job was deleted before it had ended, by a cancellation or by somebody else."""


class KubernetesPool:
    """Jobs on Kubernetes. Implements :class:`tasks.contracts.job.Pool`; the handle is the attempt's folder.

    May be used from several threads.
    """

    def __init__(self, settings: KubernetesSettings, network: NetworkProfile = "auto") -> None:
        self._settings = settings
        self._network: NetworkProfile = network
        # What this process saw first when, in monotonic seconds; a process that takes over begins to count anew.
        self._completed: dict[JobHandle, float] = {}
        self._stuck: dict[JobHandle, float] = {}
        self._pods_seen: dict[JobHandle, float] = {}
        self._ran: set[JobHandle] = set()

    def submit(self, job: JobSpec) -> JobHandle:
        folder = Path(job.folder)
        with submitting(folder):
            newest = newest_attempt(folder)
            if newest is not None and is_ours_to_ask(newest, "kubernetes"):
                handle = JobHandle(str(newest))
                self._settle(newest)
                state = self.state(handle)
                if state is JobState.UNKNOWN:
                    raise MayStillRun(f"job {job.name}: {newest} may still run and {self._why_unknown(newest)}")
                if state in (JobState.QUEUED, JobState.RUNNING):
                    self._finish_submission(newest)
                if state in (JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED):
                    return adopted(newest, job)
                self._cancel(handle)
            return self._begin(job, newest)

    def _begin(self, job: JobSpec, newest: Path | None) -> JobHandle:
        token = uuid.uuid4().hex[:12]
        # A job that cannot be is refused before it becomes an attempt.
        check_reachable(job, self._settings)
        attempt = begin_attempt(job, newest, "kubernetes")
        log_paths(job, attempt)
        rendered = render_job(job, attempt, token, self._settings, self._network)
        objects = AttemptObjects.record(open_api(self._settings.context), attempt, rendered, token)
        try:
            objects.create()
        except Unreachable:
            # It may have been made: nothing is said of its end, and the next submission looks.
            raise
        except PoolError as error:
            _conclude(attempt, JobState.FAILED, str(error))
            raise
        return JobHandle(str(attempt))

    def _settle(self, attempt: Path) -> None:
        """Say of a submission that was cut short that nothing came of it.

        Only under the submission's lock: to anybody else it looks the same while it is under way.
        """
        if state_left_behind(attempt) is not None:
            return
        objects = self._objects(attempt)
        if objects is None:
            _conclude(attempt, JobState.FAILED, "the submission was cut short before anything was made")
        elif not self._was_made(attempt, objects) and objects.job() is None and not objects.pods():
            _conclude(attempt, JobState.FAILED, f"{_missing(objects)}: the submission was cut short before it was made")

    def _was_made(self, attempt: Path, objects: AttemptObjects) -> bool:
        """Whether the Job is known to have been in the cluster, so that its absence is an end."""
        left = exit_codes(attempt, read_spec(attempt).num_nodes)
        return objects.was_made or (attempt / DELETED).exists() or any(code is not None for code in left)

    def _finish_submission(self, attempt: Path) -> None:
        """Make the Service of a Job whose maker died, or lost the API, in between."""
        objects = self._objects(attempt)
        if objects is not None and (job := objects.job()) is not None:
            objects.complete(job)

    def state(self, job: JobHandle) -> JobState:
        attempt = Path(job)
        if (ended := state_left_behind(attempt)) is not None:
            return ended
        try:
            objects = self._objects(attempt)
            if objects is None:
                return JobState.UNKNOWN
            found = objects.job()
            return self._left(attempt, objects) if found is None else self._follow_up(job, objects, found)
        except PoolError:
            return JobState.UNKNOWN

    def _follow_up(self, handle: JobHandle, objects: AttemptObjects, job: Object) -> JobState:
        """The state, with the pods looked at where the Job alone does not tell, and kept once it is final."""
        attempt, now = Path(handle), objects.now()
        state = state_of(job, [], now)
        pods: list[Object] = []
        has_ended_badly = state.is_final and state is not JobState.SUCCEEDED
        if has_ended_badly or (not state.is_final and self._should_look_at_pods(handle, job)):
            pods = objects.pods()
            if (reason := disruption(job, pods)) is not None:
                # Soon that pod is gone, and what then fails are its peers.
                _note(attempt / DISRUPTED, reason)
            state = state_of(job, pods, now)
        if state is JobState.FAILED and not is_late(pods) and (attempt / DISRUPTED).exists():
            state = JobState.PREEMPTED
        if state is JobState.SUCCEEDED:
            return self._succeeded(handle)
        if state.is_final:
            state = JobState.CANCELLED if (attempt / DELETED).exists() else state
            # A rank that the kernel killed leaves no word: its peers, who lost it, must not be taken for the cause.
            kind = FailureKind.USER if is_late(pods) or ran_out_of_memory(pods) else None
            return self._end(attempt, state, why_ended(job, pods, now), kind, objects, pods)
        if job["metadata"].get("deletionTimestamp"):
            _note(attempt / DELETED, f"Job {objects.name} was deleted while it ran")
            return JobState.RUNNING
        problem = cannot_start(pods)
        if pods and problem is None:
            self._stuck.pop(handle, None)
        elif problem is not None:
            since = self._stuck.setdefault(handle, time.monotonic())
            if time.monotonic() - since > CANNOT_START_LIMIT_S:
                waited = f"a container could not be started for {CANNOT_START_LIMIT_S} s: {problem}"
                return self._end(attempt, JobState.FAILED, waited, FailureKind.USER, objects, pods)
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

    def _succeeded(self, handle: JobHandle) -> JobState:
        attempt = Path(handle)
        if (attempt / "result.json").exists():
            return _conclude(attempt, JobState.SUCCEEDED, "")
        # Shared storage may show what a node wrote only after a while: until then nothing is said to have failed.
        seen = self._completed.setdefault(handle, time.monotonic())
        if time.monotonic() - seen <= STORAGE_LAG_S:
            return JobState.RUNNING
        return _conclude(attempt, JobState.FAILED, "all ranks ended well but none left a result")

    def _left(self, attempt: Path, objects: AttemptObjects) -> JobState:
        """The Job is gone and nobody saw it end: every node's own exit status decides; or it is not there yet."""
        pods, now = objects.pods(), objects.now()
        if any(is_running(pod) and not is_overdue(pod, now) for pod in pods):
            _note(attempt / DELETED, f"Job {objects.name} was deleted while it ran")
            return JobState.RUNNING
        if not self._was_made(attempt, objects):
            return JobState.UNKNOWN
        codes = exit_codes(attempt, read_spec(attempt).num_nodes)
        if all(code == 0 for code in codes) and (attempt / "result.json").exists():
            return _conclude(attempt, JobState.SUCCEEDED, "")
        if (attempt / DELETED).exists():
            return _conclude(attempt, JobState.CANCELLED, (attempt / DELETED).read_text())
        reason = f"{_missing(objects)}; exit status by node: {['none' if code is None else code for code in codes]}"
        if any(code not in (None, 0, LEFT_EXIT_CODE) for code in codes):
            return _conclude(attempt, JobState.FAILED, reason)
        if LEFT_EXIT_CODE in codes:
            return _conclude(attempt, JobState.PREEMPTED, reason)
        if all(code is None for code in codes):
            reason = f"{_missing(objects)}: it was deleted before any node ended"
        return _conclude(attempt, JobState.CANCELLED, reason)

    def _end(
        self,
        attempt: Path,
        state: JobState,
        reason: str,
        kind: FailureKind | None,
        objects: AttemptObjects,
        pods: list[Object],
    ) -> JobState:
        """Keep a bad end and, where a node's log has nothing, what its pod said."""
        for pod in pods:
            log = attempt / f"node-{index_of(pod)}.log"
            if not (log.exists() and log.stat().st_size) and (words := last_words(pod) or objects.pod_log(pod)):
                log.write_text(f"{words}\n")
        return _conclude(attempt, state, reason, kind)

    def explain(self, job: JobHandle) -> str | None:
        if state_left_behind(Path(job)) is not None:
            return None
        try:
            objects = self._objects(Path(job))
            found = None if objects is None else objects.job()
            if objects is None or found is None:
                is_gone = objects is not None and self._was_made(Path(job), objects)
                return None if is_gone else "its submission is under way, or was cut short: submitted again it goes on"
            if found["spec"].get("suspend"):
                return why_waiting(found, [], objects.events(found), objects.workload(found))
            if all_ready(found):
                return None
            pods = objects.pods()
            late = [pod for pod in pods if pod.get("status", {}).get("phase") == "Pending"][:1]
            return why_waiting(
                found, pods, [event for thing in [found, *late] for event in objects.events(thing)], None
            )
        except PoolError as error:
            return str(error)

    def logs(self, job: JobHandle) -> Iterator[LogLine | None]:
        yield from follow(Path(job), lambda: self.state(job).is_final, ask_every_s=POLL_S)

    def error(self, job: JobHandle) -> JobError | None:
        attempt = Path(job)
        state = self.state(job)
        if not state.is_final or state is JobState.SUCCEEDED:
            return None
        outcome = outcome_of(attempt)
        reason, kind = str(outcome["reason"]), outcome.get("kind")
        disrupted = attempt / DISRUPTED
        if state is JobState.PREEMPTED and disrupted.exists() and disrupted.read_text() not in reason:
            reason = f"{disrupted.read_text()}; {reason}"
        return job_error(attempt, reason, FailureKind(kind) if kind else None)

    def cancel(self, job: JobHandle) -> None:
        # After a submission that is under way: what it makes would outlive a cancellation that found nothing yet.
        with submitting(Path(job).parent):
            self._settle(Path(job))
            self._cancel(job)

    def _cancel(self, job: JobHandle) -> None:
        attempt = Path(job)
        objects = self._objects(attempt)
        if objects is None:
            return
        if state_left_behind(attempt) is None:
            # Said first: nodes that leave on request must not make it a preemption, to be gone on with.
            _note(attempt / DELETED, "cancelled")
        limit_s = self._settings.termination_grace_s + CANCEL_MARGIN_S
        deadline = time.monotonic() + limit_s
        is_asked = False
        while True:
            found, pods = objects.job(), objects.pods()
            # One that ended by itself stays for kubectl, as long as keep_finished_s says.
            is_through = found is None or (has_ended(found) and not is_asked)
            if is_through and not any(map(is_running, pods)):
                break
            if found is not None and not is_asked:
                objects.delete_job(found)
                is_asked = True
            for pod in pods:
                if is_overdue(pod, objects.now()):
                    objects.delete_pod_by_force(pod)
            if time.monotonic() > deadline:
                raise PoolError(
                    f"Job {objects.name} in namespace {objects.namespace} is still there {limit_s} s after its deletion "
                    f"was asked for; see kubectl -n {objects.namespace} get pods -l {TOKEN}={objects.token}"
                )
            time.sleep(POLL_S)
        _conclude(attempt, JobState.CANCELLED, "cancelled")

    def _objects(self, attempt: Path) -> AttemptObjects | None:
        """What the attempt has in the cluster; None if its submission never got that far."""
        if not (attempt / "handle.json").exists():
            return None
        return AttemptObjects(open_api(self._settings.context), attempt)

    def _why_unknown(self, attempt: Path) -> str:
        try:
            if (objects := self._objects(attempt)) is not None:
                objects.job()
        except PoolError as error:
            return str(error)
        return "the cluster could not be asked a moment ago; try again"


def _missing(objects: AttemptObjects) -> str:
    return f"Job {objects.name} is not in namespace {objects.namespace}"


def _note(path: Path, text: str) -> None:
    """Write once; the first reason is the cause."""
    if not path.exists():
        write_text(path, text)


def _conclude(attempt: Path, state: JobState, reason: str, kind: FailureKind | None = None) -> JobState:
    """Write down the end once; who comes later reads the first one's.

    Args:
        kind: where the cluster's word decides; None: the failing rank's own error does.
    """
    kind = {JobState.PREEMPTED: FailureKind.LOST, JobState.CANCELLED: FailureKind.USER}.get(state, kind)
    outcome = {"state": state.value, "reason": reason} | ({"kind": kind.value} if kind else {})
    _note(attempt / "exit.json", json.dumps(outcome))
    return state_left_behind(attempt) or state
