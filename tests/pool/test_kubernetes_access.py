"""The rights that the flow is given are those it uses: no more, no less."""

import re
import threading
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tasks.contracts.job import JobState
from tests.conftest import REPOSITORY
from tests.pool.any_pool import job
from tests.pool.emulated_cluster import WORKLOADS, ago
from tests.pool.test_kubernetes import cluster, pool  # noqa: F401 - fixtures
from tests.pool.test_kubernetes_objects import NEWEST, OLDEST

MANIFESTS = REPOSITORY / "infra" / "kubernetes" / "training-pool"
VERBS = {"POST": "create", "DELETE": "delete"}


def manifests() -> list[dict]:
    files = [path for path in sorted(MANIFESTS.glob("*.yaml")) if path.name != "kustomization.yaml"]
    return [thing for path in files for thing in yaml.safe_load_all(path.read_text())]


def right(method: str, path: str) -> tuple[str, str, str] | None:
    """``(API group, resource, verb)`` of a request; None for what everybody may ask, as which versions there are."""
    path = path.split("?")[0]
    found = re.fullmatch(r"/(?:api|apis/([^/]+))/[^/]+/namespaces/[^/]+/([^/]+)(?:/[^/]+(/[^/]+)?)?", path)
    if found is None:
        return None
    is_one = len(path.split("/namespaces/")[1].split("/")) > 2
    return found[1] or "", found[2] + (found[3] or ""), VERBS.get(method) or ("get" if is_one else "list")


def test_the_flow_may_do_what_it_does_and_nothing_else(pool, cluster, tmp_path):
    queued = type(pool)(pool._settings.model_copy(update={"queue": "team"}))
    cluster.put(WORKLOADS, "w", {"status": {"conditions": []}})
    handle = queued.submit(job(tmp_path, name="queued"))
    queued.explain(handle)
    queued.cancel(handle)
    handle = pool.submit(job(tmp_path))
    pool.explain(handle)
    # A failed pod without a word of its own, and one on a lost node.
    terminated = {"exitCode": 1, "reason": "Error", "message": ""}
    cluster.pod(0, {"phase": "Failed", "containerStatuses": [{"state": {"terminated": terminated}}]})
    lost = cluster.pod(1, {"phase": "Running"}, deletionTimestamp=ago(60), finalizers=["held"])
    assert pool.state(handle) is JobState.PREEMPTED
    Path(handle, "exit.json").unlink()

    def release() -> None:
        while ("DELETE", f"/api/v1/namespaces/team/pods/{lost['metadata']['name']}") not in cluster.seen:
            time.sleep(0.02)
        cluster.remove("v1/pods", lost["metadata"]["name"])

    thread = threading.Thread(target=release)
    thread.start()
    pool.cancel(handle)
    thread.join()
    used = {found for method, path in cluster.seen if (found := right(method, path)) is not None}
    (role,) = (thing for thing in manifests() if thing["kind"] == "Role")
    given = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert used == given


def test_the_flows_pods_have_a_token_and_the_ranks_have_none():
    accounts = {thing["metadata"]["name"]: thing for thing in manifests() if thing["kind"] == "ServiceAccount"}
    # Prefect's worker only names the account: the account itself must allow the token.
    assert accounts["proving-ground-flow"].get("automountServiceAccountToken", True)
    assert accounts["proving-ground-ranks"]["automountServiceAccountToken"] is False
    (binding,) = (thing for thing in manifests() if thing["kind"] == "RoleBinding")
    (namespace,) = (thing for thing in manifests() if thing["kind"] == "Namespace")
    # The API refuses a service account without its namespace.
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": "proving-ground-flow", "namespace": namespace["metadata"]["name"]}
    ]


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_manifest_is_valid(version):
    assert {thing["kind"] for thing in manifests()} >= {"Namespace", "ServiceAccount", "Role", "RoleBinding"}
    for thing in manifests():
        kubernetes_validate.validate(thing, version, strict=True)


def test_kustomize_takes_every_file():
    listed = yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == sorted(path.name for path in MANIFESTS.glob("*.yaml") if path.name != "kustomization.yaml")
