"""The pool's tests on a real cluster: ``IMAGE=... make test-kubernetes``, by somebody who may make namespaces.

Makes a namespace of its own, brings this checkout's code into it, runs ``tests/kubernetes/test_cluster.py`` there in a pod with
the rights of a flow, shows its output, and removes the namespace whatever happens. What may be chosen: ``Choice`` in
``objects.py``. Exit status: pytest's; 2 if the tests could not be run.
"""

import os
import secrets
import signal
import sys
import time
from dataclasses import replace
from typing import Any

from tasks.contracts.job import PoolError
from tasks.pool.kubernetes_api import ApiError, KubernetesApi, open_api, path_of
from tasks.pool.kubernetes_status import cannot_start, why_waiting
from tests.kubernetes.objects import Choice, contents, driver, namespace, pack_code

POLL_S = 2.0
START_LIMIT_S = 900
RUN_LIMIT_S = 3600
REMOVAL_LIMIT_S = 300
CANNOT_START_LIMIT_S = 120
PLURALS = {
    "ConfigMap": "configmaps",
    "PersistentVolumeClaim": "persistentvolumeclaims",
    "Pod": "pods",
    "Role": "roles",
    "RoleBinding": "rolebindings",
    "ServiceAccount": "serviceaccounts",
}


class CannotRun(Exception):
    """The tests could not be run; says why."""


def main(environment: dict[str, str]) -> int:
    if not environment.get("IMAGE"):
        print(f"set IMAGE: an image with this project's packages\n\n{Choice.__doc__}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _interrupt)
    is_ours = False
    choice = None
    try:
        choice = Choice.of(environment, f"proving-ground-test-{secrets.token_hex(3)}")
        code = pack_code()
        api = open_api(choice.context or None)
        choice = choose_node(api, choice)
        # Refused if it exists: what is removed in the end must be ours.
        api.request("POST", "/api/v1/namespaces", body=namespace(choice))
        is_ours = True
        print(
            f"namespace {choice.namespace}, image {choice.image}, {len(code)} bytes of code, node {choice.node or 'any'}"
        )
        for thing in contents(choice, code):
            create(api, thing)
        create(api, driver(choice))
        return follow(api, choice.namespace)
    except (CannotRun, PoolError, ValueError) as error:
        print(f"the tests could not be run: {error}", file=sys.stderr)
        return 2
    finally:
        if is_ours and choice is not None:
            remove(api, choice.namespace)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def choose_node(api: KubernetesApi, choice: Choice) -> Choice:
    """With a volume that one node can mount, all pods must run there."""
    if choice.node or (choice.access_mode == "ReadWriteMany" and not choice.host_path):
        return choice
    for node in api.request("GET", "/api/v1/nodes")["items"]:
        taints = [taint for taint in node["spec"].get("taints", []) if taint["effect"] in ("NoSchedule", "NoExecute")]
        conditions = {condition["type"]: condition["status"] for condition in node["status"]["conditions"]}
        if not taints and not node["spec"].get("unschedulable") and conditions.get("Ready") == "True":
            return replace(choice, node=node["metadata"]["labels"]["kubernetes.io/hostname"])
    raise CannotRun("no node is ready and without a taint; name one (NODE)")


def create(api: KubernetesApi, thing: dict[str, Any]) -> None:
    """Make an object; a new namespace's service accounts may take a moment to be known."""
    path = path_of(thing["apiVersion"], thing["metadata"]["namespace"], PLURALS[thing["kind"]])
    deadline = time.monotonic() + 30
    while True:
        try:
            api.request("POST", path, body=thing)
            return
        except ApiError as error:
            if "serviceaccount" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)


def follow(api: KubernetesApi, name: str) -> int:
    """The driver's output as it comes, and its exit status."""
    path = path_of("v1", name, "pods", "driver")
    began, num_shown, told = time.monotonic(), 0, ""
    stuck_since: float | None = None
    while True:
        pod = api.request("GET", path)
        status = pod.get("status", {})
        phase = status.get("phase", "Pending")
        if phase == "Pending":
            reason = _why_pending(api, name, pod)
            if reason != told:
                told = reason
                print(f"the driver waits: {reason}", flush=True)
            stuck_since = None if cannot_start([pod]) is None else stuck_since or time.monotonic()
            is_stuck = stuck_since is not None and time.monotonic() - stuck_since > CANNOT_START_LIMIT_S
            if is_stuck or time.monotonic() - began > START_LIMIT_S:
                raise CannotRun(f"the driver's pod does not start: {reason}")
        else:
            num_shown = _show_more(api, path, num_shown)
        if phase in ("Succeeded", "Failed"):
            _show_more(api, path, num_shown)
            ended = [s["state"].get("terminated") or {} for s in status.get("containerStatuses", [])]
            codes = [int(state["exitCode"]) for state in ended if "exitCode" in state]
            if not codes:
                raise CannotRun(f"the driver's pod is gone: {status.get('reason')} {status.get('message')}")
            return codes[0]
        if time.monotonic() - began > START_LIMIT_S + RUN_LIMIT_S:
            raise CannotRun(f"the tests still run after {(START_LIMIT_S + RUN_LIMIT_S) / 60:.0f} minutes")
        time.sleep(POLL_S)


def _show_more(api: KubernetesApi, path: str, num_shown: int) -> int:
    try:
        log = api.read("GET", f"{path}/log", query={"container": "driver"})
    except ApiError:
        # Its container has not begun.
        return num_shown
    sys.stdout.write(log[num_shown:].decode(errors="replace"))
    sys.stdout.flush()
    return max(num_shown, len(log))


def _why_pending(api: KubernetesApi, name: str, pod: dict[str, Any]) -> str:
    query = {"fieldSelector": f"involvedObject.uid={pod['metadata']['uid']}"}
    events = api.request("GET", path_of("v1", name, "events"), query=query)["items"]
    return why_waiting({"spec": {"completions": 1}}, [pod], events, None) or "no reason given"


def remove(api: KubernetesApi, name: str) -> None:
    """Delete the namespace and wait until everything in it is gone."""
    print(f"removing namespace {name}", flush=True)
    deadline = time.monotonic() + REMOVAL_LIMIT_S
    try:
        api.request("DELETE", f"/api/v1/namespaces/{name}")
        while time.monotonic() < deadline:
            api.request("GET", f"/api/v1/namespaces/{name}")
            time.sleep(POLL_S)
    except PoolError as error:
        if isinstance(error, ApiError) and error.status == 404:
            return
        print(f"namespace {name} could not be removed: {error}; kubectl delete namespace {name}", file=sys.stderr)
        return
    print(f"namespace {name} is still there after {REMOVAL_LIMIT_S} s; kubectl get all -n {name}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(dict(os.environ)))
