"""What a Job and its pods say: where they stand, what they wait for, and how they ended. Pure functions of API objects."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from tasks.contracts.job import LEFT_EXIT_CODE, JobState

Object = Mapping[str, Any]

OVERDUE = timedelta(seconds=30)
"""So long after a pod had to be gone its node is taken for lost: nobody there ends it."""
CANNOT_START = {
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImageNeverPull",
    "ErrImagePull",
    "ImageInspectError",
    "ImagePullBackOff",
    "InvalidImageName",
    "RunContainerError",
}
"""What containers wait for that seldom comes by itself."""
OOM_KILLED = "OOMKilled"
MAX_TOLD = 3


def state_of(job: Object, pods: Sequence[Object], now: datetime) -> JobState:
    """Where a Job stands.

    Final only when it says so itself (``Complete``, ``Failed``), since before that pods still run, or when the node of a
    pod that must end is lost: then it may never say so.

    Args:
        pods: those of the Job that are known; needed once it is not simply running.
        now: by the API server's clock, with a time zone.
    """
    if _condition(job, "Complete"):
        return JobState.SUCCEEDED
    failed = _condition(job, "Failed") or _condition(job, "FailureTarget")
    is_lost = any(is_overdue(pod, now) for pod in pods)
    if (_condition(job, "Failed") or is_lost) and is_late(pods):
        return JobState.FAILED
    if _condition(job, "Failed") or is_lost:
        was_left = failed is not None and re.search(rf"exit code {LEFT_EXIT_CODE}\b", failed.get("message", ""))
        return JobState.PREEMPTED if is_lost or was_left or disruption(job, pods) else JobState.FAILED
    if job["spec"].get("suspend") or _condition(job, "Suspended"):
        return JobState.QUEUED
    return JobState.RUNNING if _has_begun(job) else JobState.QUEUED


def has_ended(job: Object) -> bool:
    """Whether the Job itself says that it will never run again."""
    return _condition(job, "Complete") is not None or _condition(job, "Failed") is not None


def is_late(pods: Sequence[Object]) -> bool:
    """Whether a pod's time was up: what it was then told, and left for, is no preemption."""
    return any(pod.get("status", {}).get("reason") == "DeadlineExceeded" for pod in pods)


def ran_out_of_memory(pods: Sequence[Object]) -> bool:
    """Whether a container was killed for want of its node's or its own memory: another attempt would be as well."""
    return any(_terminated(container).get("reason") == OOM_KILLED for pod in pods for container in _containers(pod))


def all_ready(job: Object) -> bool:
    """Whether every node's container runs."""
    return bool(job.get("status", {}).get("ready", 0) >= job["spec"]["completions"])


def _has_begun(job: Object) -> bool:
    status = job.get("status", {})
    return (
        all_ready(job)
        or bool(status.get("failed") or status.get("succeeded") or status.get("uncountedTerminatedPods"))
        or any(_condition(job, kind) for kind in ("FailureTarget", "SuccessCriteriaMet"))
    )


def is_running(pod: Object) -> bool:
    """Whether its container may still run."""
    return pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")


def is_overdue(pod: Object, now: datetime) -> bool:
    """Whether a pod had to be gone for some time and is not: its node does not answer."""
    until = pod["metadata"].get("deletionTimestamp")
    return until is not None and is_running(pod) and now - datetime.fromisoformat(until) > OVERDUE


def disruption(job: Object, pods: Sequence[Object]) -> str | None:
    """What took a pod away that was not its own doing (preemption, eviction, drain, a lost node); None if nothing did."""
    for pod in pods:
        if condition := _condition(pod, "DisruptionTarget"):
            return f"{_name(pod)}{_on_node(pod)}: {_said(condition)}"
    message = str((_condition(job, "Failed") or _condition(job, "FailureTarget") or {}).get("message", ""))
    return message if "DisruptionTarget" in message else None


def cannot_start(pods: Sequence[Object]) -> str | None:
    """Why a container cannot be started, as an image that is not there; None if none says so."""
    for pod in pods:
        for status in _containers(pod):
            waiting = status.get("state", {}).get("waiting", {})
            if waiting.get("reason") in CANNOT_START:
                return f"{_name(pod)}{_on_node(pod)}: {_said(waiting)}"
    return None


def why_waiting(job: Object, pods: Sequence[Object], events: Sequence[Object], workload: Object | None) -> str | None:
    """What a Job that does not run waits for, in the cluster's words.

    Args:
        events: of the Job and of a pod that does not start; the newest counts.
        workload: Kueue's, where there is one.
    """
    if job["spec"].get("suspend"):
        reasons = [_said(c) for c in (workload or {}).get("status", {}).get("conditions", []) if c["status"] == "False"]
        return reasons[0] if reasons else _newest(events) or "suspended, and not yet admitted to its queue"
    waiting = []
    for pod in pods:
        scheduled = _condition(pod, "PodScheduled", status="False")
        if scheduled:
            waiting.append(_said(scheduled))
        elif (problem := cannot_start([pod])) is not None:
            waiting.append(problem)
    for pod in [] if waiting else pods:
        if pod.get("status", {}).get("phase") == "Pending":
            waiting.append(f"{_name(pod)}{_on_node(pod)} starts: {_newest(events) or 'no reason given'}")
            break
    if not waiting and len(pods) < job["spec"]["completions"]:
        # Quota, Pod Security, a missing service account: no pod is even made.
        return _newest(events)
    return _summary(waiting)


def why_ended(job: Object, pods: Sequence[Object], now: datetime) -> str:
    """How a Job ended that did not end well: the Job's words and those of every pod that has some."""
    lost = [f"{_name(pod)}: its node{_on_node(pod)} does not answer" for pod in pods if is_overdue(pod, now)]
    failed = _condition(job, "Failed") or _condition(job, "FailureTarget")
    limits = ["ran longer than its limit; raise pool.time_limit_minutes"] if is_late(pods) else []
    if ran_out_of_memory(pods):
        limits.append("ran out of memory; raise pool.kubernetes.memory_per_node, or use fewer processes_per_node")
    told = limits + lost + [words for words in (_said(failed) if failed else None, disruption(job, pods)) if words]
    return (
        "; ".join(dict.fromkeys([*told, *(words for pod in pods if (words := _pod_ended(pod)))])) or "no reason given"
    )


def _pod_ended(pod: Object) -> str | None:
    parts = []
    if (status := pod.get("status", {})).get("reason"):
        parts.append(_said(status))
    for container in _containers(pod):
        ended = _terminated(container)
        if ended.get("exitCode"):
            signal = f", signal {ended['signal']}" if ended.get("signal") else ""
            # The container's own last lines, where no reason of the system's stands there.
            parts.append(f"{ended.get('reason', 'Error')} (exit code {ended['exitCode']}{signal})")
    return f"{_name(pod)}{_on_node(pod)}: {', '.join(parts)}" if parts else None


def last_words(pod: Object) -> str:
    """The last lines of a container that ended badly, as the pod's status keeps them."""
    words = [_terminated(container).get("message", "") for container in _containers(pod)]
    return "\n".join(word.strip() for word in words if word)


def index_of(pod: Object) -> int:
    """The node's rank."""
    return int(pod["metadata"].get("annotations", {}).get("batch.kubernetes.io/job-completion-index", 0))


def _condition(thing: Object, kind: str, *, status: str = "True") -> Object | None:
    for condition in thing.get("status", {}).get("conditions") or []:
        if condition["type"] == kind and condition["status"] == status:
            found: Object = condition
            return found
    return None


def _containers(pod: Object) -> list[Object]:
    return pod.get("status", {}).get("containerStatuses") or []


def _terminated(container: Object) -> Object:
    """How a container ended; empty while it has not."""
    return container.get("state", {}).get("terminated") or {}


def _said(thing: Object) -> str:
    return ": ".join(str(thing[part]) for part in ("reason", "message") if thing.get(part)) or "no reason given"


def _newest(events: Sequence[Object]) -> str | None:
    def when(event: Object) -> str:
        series = event.get("series") or {}
        return str(series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime") or "")

    return _said(max(events, key=when)) if events else None


def _summary(reasons: Sequence[str]) -> str | None:
    """Each reason once; hundreds of pods wait for the same."""
    different = list(dict.fromkeys(reasons))
    if not different:
        return None
    more = f" (and {len(different) - MAX_TOLD} more)" if len(different) > MAX_TOLD else ""
    return "; ".join(different[:MAX_TOLD]) + more


def _name(pod: Object) -> str:
    return f"pod {pod['metadata']['name']}"


def _on_node(pod: Object) -> str:
    node = pod.get("spec", {}).get("nodeName")
    return f" on {node}" if node else ""
