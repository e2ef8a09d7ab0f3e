"""The driver of the cluster's tests, against an emulated API: what it makes, shows, returns and removes."""

import base64
import io
import subprocess
import sys
import tarfile
import threading
import time

import kubernetes_validate
import pytest

from tasks.pool import kubernetes_api
from tests.conftest import REPOSITORY
from tests.kubernetes import __main__ as run
from tests.kubernetes.objects import MAX_CONFIG_MAP_BYTES, Choice, contents, driver, namespace, pack_code, pool_settings
from tests.pool.emulated_cluster import refuse, running_cluster
from tests.pool.test_kubernetes_objects import NEWEST, OLDEST

CLAIM = Choice("image", "own", storage_class="standard", node="node-1")
HOST = Choice("image", "own", host_path="/var/lib/proving-ground", node="node-1")


@pytest.fixture(scope="module")
def code():
    return pack_code()


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(kubernetes_api, "WAITS_S", (0.01,))
    monkeypatch.setattr(run, "POLL_S", 0.05)
    with running_cluster(tmp_path / "kubeconfig") as cluster:
        cluster.namespace = "own"
        cluster.resources["v1/nodes"] = {}
        yield cluster
        kubernetes_api.open_api(None).close()


def play(cluster, *statuses: dict, log: bytes = b"") -> threading.Thread:
    """What the cluster does with the driver's pod."""

    def go() -> None:
        deadline = time.monotonic() + 10
        while not cluster.names("pods") and time.monotonic() < deadline:
            time.sleep(0.01)
        cluster["get /api/v1/namespaces/own/pods/driver/log"] << log
        for status in statuses:
            cluster.objects["v1/pods", "own", "driver"].patch({"status": status})
            time.sleep(0.3)

    thread = threading.Thread(target=go)
    thread.start()
    return thread


def ended(code: int) -> dict:
    return {
        "phase": "Succeeded" if code == 0 else "Failed",
        "containerStatuses": [{"state": {"terminated": {"exitCode": code}}}],
    }


@pytest.mark.parametrize("version", [OLDEST, "1.36.0", NEWEST])
@pytest.mark.parametrize("choice", [CLAIM, HOST], ids=["claim", "host-path"])
def test_every_object_is_valid(choice, version, code):
    for thing in [namespace(choice), *contents(choice, code), driver(choice)]:
        kubernetes_validate.validate(thing, version, strict=True)


def test_the_code_fits_and_holds_what_the_suite_imports(code, tmp_path):
    (packed,) = (thing for thing in contents(CLAIM, code) if thing["kind"] == "ConfigMap")
    assert len(packed["binaryData"]["code.tgz"]) < MAX_CONFIG_MAP_BYTES
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(packed["binaryData"]["code.tgz"]))) as archive:
        archive.extractall(tmp_path, filter="data")
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:kmock", "-q", "-rs"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/kubernetes/test_cluster.py"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "cluster" in done.stdout
    assert str(REPOSITORY) not in done.stdout


def test_a_restricted_namespace_unless_the_nodes_own_folder_is_used():
    level = "pod-security.kubernetes.io/enforce"
    assert namespace(CLAIM)["metadata"]["labels"][level] == "restricted"
    assert namespace(HOST)["metadata"]["labels"][level] == "privileged"
    assert "initContainers" not in driver(CLAIM)["spec"]


def test_the_jobs_mount_what_the_driver_mounts_on_the_same_node():
    for choice in (CLAIM, HOST):
        settings = pool_settings(choice)
        pod = driver(choice)["spec"]
        (shared,) = (volume for volume in pod["volumes"] if volume["name"] == "shared")
        (ours,) = settings.volumes
        assert ours.claim == shared.get("persistentVolumeClaim", {}).get("claimName")
        assert ours.host_path == shared.get("hostPath", {}).get("path")
        assert settings.node_selector == pod["nodeSelector"] == {"kubernetes.io/hostname": "node-1"}


@pytest.mark.parametrize("code", [0, 1])
def test_it_shows_the_drivers_output_returns_its_status_and_removes_its_namespace(cluster, capsys, code):
    waiting = {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "message": "no room"}]}
    thread = play(cluster, waiting, {"phase": "Running"}, ended(code), log=b"tests/kubernetes: 12 passed\n")
    assert run.main({"IMAGE": "image", "NAMESPACE": "own", "NODE": "node-1"}) == code
    thread.join()
    shown = capsys.readouterr().out
    assert "the driver waits: no room" in shown
    assert shown.count("12 passed") == 1
    assert cluster.namespaces == []
    assert {"serviceaccounts", "roles", "rolebindings", "configmaps", "persistentvolumeclaims", "pods"} <= {
        path.rsplit("/", 1)[-1] for method, path in cluster.seen if method == "POST"
    }


def test_a_namespace_that_exists_is_neither_used_nor_removed(cluster, capsys):
    cluster.namespaces.append("own")
    assert run.main({"IMAGE": "image", "NAMESPACE": "own", "NODE": "node-1"}) == 2
    assert cluster.namespaces == ["own"]
    assert "already exists" in capsys.readouterr().err


def test_what_cannot_be_made_is_told_and_the_namespace_goes(cluster, capsys):
    cluster.faults.append(
        ("POST", "/rolebindings", refuse(403, "rolebindings is forbidden: attempting to grant rights"))
    )
    assert run.main({"IMAGE": "image", "NAMESPACE": "own", "NODE": "node-1"}) == 2
    assert "attempting to grant rights" in capsys.readouterr().err
    assert cluster.namespaces == []


def test_an_image_that_is_not_there_ends_it(cluster, capsys, monkeypatch):
    monkeypatch.setattr(run, "CANNOT_START_LIMIT_S", 0.1)
    waiting = {"reason": "ErrImagePull", "message": "not found"}
    thread = play(cluster, {"phase": "Pending", "containerStatuses": [{"state": {"waiting": waiting}}]})
    assert run.main({"IMAGE": "image", "NAMESPACE": "own", "NODE": "node-1"}) == 2
    thread.join()
    assert "does not start: pod driver: ErrImagePull: not found" in capsys.readouterr().err
    assert cluster.namespaces == []


def test_an_interruption_removes_the_namespace(cluster, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "follow", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.main({"IMAGE": "image", "NAMESPACE": "own", "NODE": "node-1"})
    assert cluster.namespaces == []


def test_a_node_that_takes_pods_is_found(cluster):
    def node(name: str, **spec) -> None:
        status = {"conditions": [{"type": "Ready", "status": "True"}]}
        meta = {"name": name, "labels": {"kubernetes.io/hostname": name}}
        cluster.objects["v1/nodes", None, name] = {"metadata": meta, "spec": spec, "status": status}

    node("control-plane", taints=[{"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}])
    node("drained", unschedulable=True)
    node("worker")
    api = kubernetes_api.open_api(None)
    assert run.choose_node(api, Choice("image", "own")).node == "worker"
    assert run.choose_node(api, Choice("image", "own", access_mode="ReadWriteMany")).node == ""


def test_without_an_image_it_says_what_is_wanted(capsys):
    assert run.main({}) == 2
    assert "set IMAGE" in capsys.readouterr().err
