"""What the cluster's tests need in the cluster, all of it in one namespace of their own: pure functions."""

import base64
import gzip
import io
import json
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from tasks.contracts.kubernetes_settings import KubernetesSettings
from tests.conftest import REPOSITORY
from tests.kubernetes.test_cluster import SETTINGS

Object = dict[str, Any]

MANIFESTS = REPOSITORY / "infra" / "kubernetes" / "training-pool"
MAX_CONFIG_MAP_BYTES = 1 << 20
MOUNT = "/shared"
CODE = f"{MOUNT}/code"
USER = 1000
BOOT = f"""
import os, shutil, subprocess, sys, tarfile
tarfile.open("/code/code.tgz").extractall("{CODE}", filter="data")
options = ["-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:kmock", "-v", "--basetemp={MOUNT}/tmp"]
done = subprocess.run([sys.executable, "-u", "-m", "pytest", *options, *sys.argv[1:]], cwd="{CODE}")
for name in os.listdir("{MOUNT}"):
    shutil.rmtree(os.path.join("{MOUNT}", name), ignore_errors=True)
sys.exit(done.returncode)
"""


@dataclass(frozen=True)
class Choice:
    """What whoever runs the tests chose; every field is an environment variable in capitals.

    Attributes:
        image: with this project's packages (extras train, kubernetes, dev) for ``python``.
        namespace: made and removed by the tests; it must not exist.
        storage_class: of the claim; empty: the cluster's default.
        host_path: folder on the node in place of a claim.
        access_mode: of the claim. With anything but ReadWriteMany all pods run on one node.
        node: that node, by its label kubernetes.io/hostname; empty: the first that takes pods.
        context: of the kubeconfig; empty: the current one.
        python: the interpreter in the image.
        tests: what of the suite runs, as pytest's ``-k``; empty: everything.
    """

    image: str
    namespace: str
    storage_class: str = ""
    host_path: str = ""
    access_mode: str = "ReadWriteOnce"
    node: str = ""
    context: str = ""
    python: str = "python3"
    tests: str = ""

    @classmethod
    def of(cls, environment: Mapping[str, str], namespace: str) -> "Choice":
        """Raises ValueError for what cannot be run."""
        given = {name: environment.get(name.upper(), "") for name in cls.__dataclass_fields__}
        choice = cls(**{"namespace": namespace} | {name: value for name, value in given.items() if value})
        if choice.host_path and choice.storage_class:
            raise ValueError("HOST_PATH and STORAGE_CLASS: give one of them")
        return choice


def pack_code() -> bytes:
    """The tracked Python code and what it reads, as a gzip'd tar: the image brings only what the code depends on.

    Raises:
        ValueError: it does not fit into a ConfigMap.
    """
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "tasks", "tests/*.py"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name in sorted(filter(None, tracked.split("\0"))):
            if (REPOSITORY / name).is_file():
                archive.add(REPOSITORY / name, name, filter=_anybodys)
    packed = gzip.compress(tar.getvalue(), mtime=0)
    if len(packed) >= MAX_CONFIG_MAP_BYTES:
        raise ValueError(f"the code is {len(packed)} bytes and a ConfigMap holds {MAX_CONFIG_MAP_BYTES}")
    return packed


def _anybodys(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = USER
    member.uname = member.gname = ""
    return member


def pool_settings(choice: Choice) -> KubernetesSettings:
    """How the suite's jobs run."""
    volume = {"mount_path": MOUNT} | (
        {"host_path": f"{choice.host_path}/{choice.namespace}"} if choice.host_path else {"claim": "proving-ground"}
    )
    return KubernetesSettings(
        namespace=choice.namespace,
        image=choice.image,
        python=choice.python,
        volumes=(volume,),
        node_selector={"kubernetes.io/hostname": choice.node} if choice.node else {},
        service_account="proving-ground-ranks",
        run_as_user=USER,
        run_as_group=USER,
        shared_memory="256Mi",
        termination_grace_s=20,
    )


def namespace(choice: Choice) -> Object:
    """The tests' own; as strict as Kubernetes knows, except that a folder of the node is forbidden there."""
    level = "privileged" if choice.host_path else "restricted"
    labels = {"pod-security.kubernetes.io/enforce": level, "app.kubernetes.io/name": "proving-ground"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": choice.namespace, "labels": labels}}


def contents(choice: Choice, code: bytes) -> list[Object]:
    """What is made in the namespace before the driver: the accounts and rights that we ship, the claim, the code."""
    shipped: list[Object] = list(yaml.safe_load_all((MANIFESTS / "accounts.yaml").read_text()))
    if not choice.host_path:
        claim = yaml.safe_load((MANIFESTS / "claim.yaml").read_text())
        claim["spec"] |= {"accessModes": [choice.access_mode], "resources": {"requests": {"storage": "2Gi"}}}
        if choice.storage_class:
            claim["spec"]["storageClassName"] = choice.storage_class
        shipped.append(claim)
    packed = {"code.tgz": base64.b64encode(code).decode()}
    shipped.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "code"}, "binaryData": packed})
    for thing in shipped:
        thing["metadata"]["namespace"] = choice.namespace
        for subject in thing.get("subjects", []):
            subject["namespace"] = choice.namespace
    return shipped


def driver(choice: Choice) -> Object:
    """The pod that runs the suite, as a flow would: with the flow's account and the shared folder."""
    settings = pool_settings(choice)
    shared: Object = {"persistentVolumeClaim": {"claimName": "proving-ground"}}
    prepare: list[Object] = []
    if choice.host_path:
        shared = {"hostPath": {"path": f"{choice.host_path}/{choice.namespace}", "type": "DirectoryOrCreate"}}
        prepare = [
            {
                "name": "prepare",
                "image": choice.image,
                "command": [choice.python, "-c", f"import os; os.chown('{MOUNT}', {USER}, {USER})"],
                "securityContext": {"runAsUser": 0, "runAsNonRoot": False},
                "volumeMounts": [{"name": "shared", "mountPath": MOUNT}],
            }
        ]
    tests = ["-k", choice.tests] if choice.tests else []
    env = {
        SETTINGS: json.dumps(settings.model_dump(mode="json", exclude_defaults=True)).replace("$", "$$"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": "/tmp",
        "USER": "flow",
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "driver", "namespace": choice.namespace, "labels": {"app.kubernetes.io/name": "driver"}},
        "spec": {
            "restartPolicy": "Never",
            "serviceAccountName": "proving-ground-flow",
            "automountServiceAccountToken": True,
            "enableServiceLinks": False,
            "nodeSelector": settings.node_selector,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            **({"initContainers": prepare} if prepare else {}),
            "containers": [
                {
                    "name": "driver",
                    "image": choice.image,
                    "command": [choice.python, "-c", BOOT, "tests/kubernetes/test_cluster.py", *tests],
                    "workingDir": "/tmp",
                    "env": [{"name": name, "value": value} for name, value in env.items()],
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "volumeMounts": [
                        {"name": "shared", "mountPath": MOUNT},
                        {"name": "code", "mountPath": "/code", "readOnly": True},
                        {"name": "tmp", "mountPath": "/tmp"},
                    ],
                }
            ],
            "volumes": [
                {"name": "shared", **shared},
                {"name": "code", "configMap": {"name": "code"}},
                {"name": "tmp", "emptyDir": {}},
            ],
        },
    }
