"""Kubernetes' nodes: one gets a taint, so that nothing new starts on it that does not tolerate it. What runs there goes on."""

import re
from typing import Any

from tasks.contracts.job import PoolError
from tasks.pool.kubernetes_api import ApiError, KubernetesApi

KEY = "proving-ground/cluster-check"
EFFECT = "NoSchedule"
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
MERGE_PATCH = "application/merge-patch+json"
CONFLICT = 409
TRIES = 5
WHO_MAY = "who may patch nodes (infra/kubernetes/node-taints gives flows that right, a cluster administrator has it)"


def taint_of(run: str) -> dict[str, str]:
    """The taint of a check; its value tells which one, where its name can be one."""
    return {"key": KEY, "value": run if VALUE.fullmatch(run) else "failed", "effect": EFFECT}


def untaint_command(node: str) -> list[str]:
    """What puts a node back to use.

    Raises:
        ValueError: that is no name of a node.
    """
    return ["kubectl", "taint", "nodes", _one(node), f"{KEY}:{EFFECT}-"]


def taint(api: KubernetesApi, node: str, wanted: dict[str, str]) -> str | None:
    """Taint a node; where an earlier check has, nothing is done, and that taint is returned.

    Raises:
        PoolError: the API refuses, does not answer, or others keep changing the node.
    """
    path = f"/api/v1/nodes/{_one(node)}"
    has_asked = False
    # Once more than it is tried: it is done when the node says so.
    for tried in range(TRIES + 1):
        found = api.request("GET", path)
        taints: list[dict[str, Any]] = list(found.get("spec", {}).get("taints") or [])
        ours = next((t for t in taints if t.get("key") == KEY and t.get("effect") == EFFECT), None)
        if ours is not None:
            # Ours also where the answer to the patch was lost: the node is as it should be.
            return None if has_asked else f"{KEY}={ours.get('value')}:{EFFECT}"
        if tried == TRIES:
            break
        # The list is replaced whole; the version lets the API refuse it where somebody else has changed the node meanwhile.
        patch = {
            "metadata": {"resourceVersion": found["metadata"]["resourceVersion"]},
            "spec": {"taints": [*taints, wanted]},
        }
        has_asked = True
        try:
            api.request("PATCH", path, body=patch, content_type=MERGE_PATCH)
        except ApiError as error:
            if error.status != CONFLICT:
                raise
    raise PoolError(
        f"node {node} was changed by others {TRIES} times while it was to be tainted; see kubectl get node {node} -o yaml"
    )


def _one(node: str) -> str:
    if not NAME.fullmatch(node) or len(node) > 253:
        raise ValueError(
            f"{node!r} is no name of a node: lower-case letters, digits, '-' and '.', as kubectl get nodes shows them"
        )
    return node
