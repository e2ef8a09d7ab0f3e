"""A node of Kubernetes is tainted beside what others have put there, and only by who was given the right."""

import json

import pytest
import yaml

from tasks.contracts.job import PoolError
from tasks.contracts.pool_settings import PoolSettings
from tasks.pool import kubernetes_nodes
from tasks.pool.kubernetes_api import open_api
from tasks.pool.out_of_use import planned, take_out
from tests.conftest import REPOSITORY
from tests.pool.emulated_cluster import do_and_hang_up, refuse
from tests.pool.test_kubernetes import cluster  # noqa: F401 - fixture

POOL = PoolSettings(backend="kubernetes", num_nodes=2)
OURS = {"key": "proving-ground/cluster-check", "value": "nightly-7", "effect": "NoSchedule"}
NVIDIA = {"key": "nvidia.com/gpu", "effect": "NoSchedule"}
ROLE = REPOSITORY / "infra" / "kubernetes" / "node-taints" / "role.yaml"


@pytest.fixture
def node(cluster):
    return cluster.add_node("gpu-1", taints=[NVIDIA])


def taint_gpu_1():
    plan = planned(POOL, "gpu-1", "nightly-7", ["devices/throttled_share"])
    return take_out(POOL, plan, "nightly-7", ["devices/throttled_share"])


def test_a_taint_is_added_beside_those_of_others_and_the_next_check_leaves_it(cluster, node):
    assert taint_gpu_1().state == "done"
    assert node["spec"]["taints"] == [NVIDIA, OURS]
    again = take_out(POOL, planned(POOL, "gpu-1", "nightly-8", []), "nightly-8", [])
    assert (again.state, again.detail) == ("already", "proving-ground/cluster-check=nightly-7:NoSchedule")
    assert node["spec"]["taints"] == [NVIDIA, OURS]
    assert [method for method, _ in cluster.seen] == ["GET", "PATCH", "GET", "GET"]


def test_what_somebody_else_puts_on_the_node_meanwhile_stays(cluster, node):
    theirs = {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}

    async def change_it_first(raw, go_on):
        node["spec"]["taints"] = [NVIDIA, theirs]
        node["metadata"]["resourceVersion"] = "77"
        return await go_on()

    cluster.faults.append(("PATCH", "/nodes/", change_it_first))
    assert taint_gpu_1().state == "done"
    assert node["spec"]["taints"] == [NVIDIA, theirs, OURS]


def test_a_taint_that_is_there_after_the_last_try_is_done(cluster, node):
    cluster.faults += [("PATCH", "/nodes/", refuse(409, "the object has been modified"))] * (kubernetes_nodes.TRIES - 1)
    assert taint_gpu_1().state == "done"
    assert node["spec"]["taints"] == [NVIDIA, OURS]


def test_what_nobody_thought_of_is_told_of_the_node_and_costs_no_verdict(monkeypatch):
    def surprise(context):
        raise UnicodeDecodeError("utf-8", b"\xe4", 0, 1, "invalid start byte")

    monkeypatch.setattr("tasks.pool.out_of_use.open_api", surprise)
    action = taint_gpu_1()
    assert action.state == "failed"
    assert action.detail.startswith("UnicodeDecodeError: ")


def test_an_answer_that_was_lost_is_looked_for_and_not_done_twice(cluster, node):
    cluster.faults.append(("PATCH", "/nodes/", do_and_hang_up))
    assert taint_gpu_1().state == "done"
    assert node["spec"]["taints"] == [NVIDIA, OURS]


def test_a_node_that_others_keep_changing_is_given_up_loudly(cluster, node):
    cluster.faults += [("PATCH", "/nodes/", refuse(409, "the object has been modified"))] * kubernetes_nodes.TRIES
    done = taint_gpu_1()
    assert done.state == "failed"
    assert "node gpu-1 was changed by others 5 times" in done.detail
    assert node["spec"]["taints"] == [NVIDIA]


def test_without_the_right_the_refusal_says_where_it_is_given(cluster, node):
    words = 'nodes "gpu-1" is forbidden: User "flow" cannot get resource "nodes" in API group "" at the cluster scope'
    cluster.faults.append(("GET", "/nodes/", refuse(403, words)))
    done = taint_gpu_1()
    assert done.state == "failed"
    assert words in done.detail
    assert "infra/kubernetes/node-taints" in done.detail


def test_a_node_that_is_not_there_is_an_error(cluster):
    with pytest.raises(PoolError, match='nodes "gpu-9" not found'):
        kubernetes_nodes.taint(open_api(None), "gpu-9", OURS)


def test_the_component_gives_the_rights_that_are_used_and_no_other(cluster, node):
    assert taint_gpu_1().state == "done"
    verbs = {"GET": "get", "PATCH": "patch"}
    used = {verbs[method] for method, path in cluster.seen if path == "/api/v1/nodes/gpu-1"}
    assert {path for _, path in cluster.seen} == {"/api/v1/nodes/gpu-1"}
    role, binding = yaml.safe_load_all(ROLE.read_text())
    (rule,) = role["rules"]
    assert (rule["apiGroups"], rule["resources"], set(rule["verbs"])) == ([""], ["nodes"], used)
    assert binding["roleRef"]["name"] == role["metadata"]["name"]


def test_a_runs_name_that_is_no_label_does_not_spoil_the_taint():
    assert kubernetes_nodes.taint_of("my run!")["value"] == "failed"
    assert json.loads(planned(POOL, "gpu-1", "my run!", []).what.removeprefix("taint "))["value"] == "failed"
    for name in ("Gpu-1", "gpu_1", "gpu-1/status", "gpu-1?force", "../pods", ""):
        with pytest.raises(ValueError, match="is no name of a node"):
            planned(POOL, name, "run", [])
