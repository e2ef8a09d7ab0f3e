"""The objects of a job on Kubernetes: pure functions of the job, its attempt's folder and the cluster's settings.

One Indexed Job per attempt, one pod per node. Any pod's failure fails the whole Job: ranks that lost a peer cannot go on,
and what was lost is gone on with by another attempt. A headless Service gives pod 0 the name under which all meet.
"""

import hashlib
import math
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from tasks.contracts.job import LEFT_EXIT_CODE, JobSpec
from tasks.contracts.kubernetes_settings import KubernetesSettings, VolumeSettings
from tasks.contracts.pool_settings import NetworkProfile
from tasks.pool.launch import Rendezvous, agent_command
from tasks.pool.network import network_environment
from tasks.pool.torchrun_files import FAILURES

Object = dict[str, Any]

CONTAINER = "ranks"
PORT = 29_400
"""Of the rendezvous; every pod has an address of its own, so jobs cannot collide."""
TOKEN = "proving-ground/attempt"  # noqa: S105 - names the label that marks an attempt's objects
FOLDER = "proving-ground/folder"
MAX_NAME = 63 - len("-1023")
"""A pod's host name is the Job's name, '-' and its index, and a DNS label."""
LOST_TAINTS = "node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready"


def object_name(job: JobSpec, attempt: Path) -> str:
    """The name of the Job and of its Service: readable, and the same for the same attempt.

    It begins with a letter, as Services must. The digest of the attempt's folder tells apart names that are cut or that
    differ only in characters that DNS does not have.
    """
    digest = hashlib.sha256(str(attempt).encode()).hexdigest()[:10]
    ending = f"-{attempt.name}-{digest}"
    readable = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).lstrip("-0123456789")[: MAX_NAME - len(ending)].rstrip("-")
    return f"{readable or 'job'}{ending}"


def check_reachable(job: JobSpec, kubernetes: KubernetesSettings) -> None:
    """Raise ValueError where pods could not see what the job is to read and write."""
    if kubernetes.image is None:
        raise ValueError("pool.kubernetes.image is empty: name the image that the pods run")
    shared = [volume for volume in kubernetes.volumes if volume.size is None and not volume.read_only]
    for what, folder in (("folder", job.folder), ("log folder", job.log_folder)):
        if folder is not None and not any(_is_below(folder, volume.mount_path) for volume in shared):
            mounted = ", ".join(volume.mount_path for volume in shared) or "nothing"
            raise ValueError(
                f"the job's {what} {folder} is on no shared volume of the pods ({mounted} is mounted to be written); set "
                "storage.shared and storage.logs below the mount_path of a claim or host_path in pool.kubernetes.volumes"
            )
    scratch = job.env.get("TMPDIR")
    writable = ["/tmp", *(volume.mount_path for volume in kubernetes.volumes if not volume.read_only)]  # noqa: S108
    if scratch is not None and not any(_is_below(scratch, path) for path in writable):
        raise ValueError(
            f"storage.scratch={scratch} is on no volume of the pods, whose root is read-only; add one with size to "
            f"pool.kubernetes.volumes, or use a folder below {' or '.join(writable)}"
        )


def _is_below(folder: str, mount_path: str) -> bool:
    return PurePosixPath(folder).is_relative_to(mount_path) and ".." not in PurePosixPath(folder).parts


def render_job(
    job: JobSpec, attempt: Path, token: str, kubernetes: KubernetesSettings, network: NetworkProfile = "auto"
) -> Object:  # fmt: skip
    """The Job.

    Args:
        attempt: the attempt's folder.
        network: what the nodes speak to each other over.
        token: tells this attempt from those of that name in other storage folders.

    Raises:
        ValueError: the pods could not see the job's files, or there is no image.
    """
    check_reachable(job, kubernetes)
    name = object_name(job, attempt)
    labels = {"app.kubernetes.io/name": "proving-ground", TOKEN: token, **kubernetes.labels}
    topology = {
        "kueue.x-k8s.io/podset-required-topology": kubernetes.required_topology,
        "kueue.x-k8s.io/podset-preferred-topology": kubernetes.preferred_topology,
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "namespace": kubernetes.namespace,
            "labels": labels | _given({"kueue.x-k8s.io/queue-name": kubernetes.queue}),
            "annotations": {FOLDER: str(attempt)},
        },
        "spec": {
            "completionMode": "Indexed",
            "completions": job.num_nodes,
            "parallelism": job.num_nodes,
            "backoffLimit": 0,
            # A pod whose node does not answer may still run: none takes its place beside it.
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": _failure_rules()},
            "ttlSecondsAfterFinished": kubernetes.keep_finished_s,
            **({"suspend": True} if kubernetes.queue else {}),
            "template": {
                "metadata": {
                    "labels": labels,
                    "annotations": {FOLDER: str(attempt)} | kubernetes.annotations | _given(topology),
                },
                "spec": _pod(job, attempt, name, token, kubernetes, network),
            },
        },
    }


def render_service(job: Object, uid: str) -> Object:
    """The headless Service under which the pods of a rendered Job find pod 0; it goes with the Job of that ``uid``."""
    meta = job["metadata"]
    token = meta["labels"][TOKEN]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": meta["name"],
            "namespace": meta["namespace"],
            "labels": {"app.kubernetes.io/name": "proving-ground", TOKEN: token},
            "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": meta["name"], "uid": uid}],
        },
        "spec": {
            "clusterIP": "None",
            # Pods look for each other while they start.
            "publishNotReadyAddresses": True,
            "selector": {TOKEN: token},
            "ports": [{"name": "rendezvous", "port": PORT, "targetPort": PORT}],
        },
    }


def _failure_rules() -> list[Object]:
    """Which pod ended the Job, and how, is then in the words of the Job's own condition."""
    return [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [LEFT_EXIT_CODE]},
        },
        {"action": "FailJob", "onExitCodes": {"containerName": CONTAINER, "operator": "NotIn", "values": [0]}},
    ]


def _pod(
    job: JobSpec, attempt: Path, name: str, token: str, kubernetes: KubernetesSettings, network: NetworkProfile
) -> Object:  # fmt: skip
    spread = kubernetes.spread_over and [
        {
            "maxSkew": 1,
            "topologyKey": kubernetes.spread_over,
            "whenUnsatisfiable": "DoNotSchedule",
            "labelSelector": {"matchLabels": {TOKEN: token}},
        }
    ]
    lost = [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": kubernetes.lost_node_s}
        for key in LOST_TAINTS
    ]
    return _given(
        {
            "restartPolicy": "Never",
            "subdomain": name,
            # Of the pod and not of the Job, whose clock runs while its pods wait for nodes.
            "activeDeadlineSeconds": max(1, math.ceil(job.time_limit_s)),
            "terminationGracePeriodSeconds": kubernetes.termination_grace_s,
            "serviceAccountName": kubernetes.service_account,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "imagePullSecrets": [{"name": secret} for secret in kubernetes.image_pull_secrets] or None,
            "nodeSelector": kubernetes.node_selector or None,
            "tolerations": [t.model_dump(exclude_none=True) for t in kubernetes.tolerations] + lost,
            "topologySpreadConstraints": spread,
            "priorityClassName": kubernetes.priority_class,
            "runtimeClassName": kubernetes.runtime_class,
            "securityContext": {
                "runAsNonRoot": kubernetes.run_as_user != 0,
                "runAsUser": kubernetes.run_as_user,
                "runAsGroup": kubernetes.run_as_group,
                "fsGroup": kubernetes.run_as_group,
                # Else every start goes through all files of a claim.
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [_container(job, attempt, name, kubernetes, network)],
            "volumes": [
                {"name": "tmp", "emptyDir": {}},
                {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": kubernetes.shared_memory}},
                *({"name": f"volume-{i}", **_source(volume)} for i, volume in enumerate(kubernetes.volumes)),
            ],
        }
    )


def _container(
    job: JobSpec, attempt: Path, name: str, kubernetes: KubernetesSettings, network: NetworkProfile
) -> Object:  # fmt: skip
    python = kubernetes.python or sys.executable
    rendezvous = Rendezvous(f"{name}-0.{name}", PORT, name)
    agent = agent_command(
        job,
        rendezvous,
        spec=str(attempt / "spec.json"),
        failures=str(attempt / FAILURES),
        python=python,
    )
    wrapper = [python, "-m", "tasks.pool.kubernetes_pod", str(attempt), f"{rendezvous.host}:{rendezvous.port}"]
    return {
        "name": CONTAINER,
        "image": kubernetes.image,
        "imagePullPolicy": kubernetes.image_pull_policy,
        "command": [_literal(word) for word in [*wrapper, *agent]],
        # Not the image's own: -m would take a copy of our packages there before that of PYTHONPATH.
        "workingDir": "/tmp",  # noqa: S108
        "env": _environment(job, kubernetes, network),
        "resources": _resources(job, kubernetes),
        # The last lines are then in the pod's status, also where logs may not be read.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"], **({"add": ["IPC_LOCK"]} if kubernetes.lock_memory else {})},
        },
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
            {"name": "shared-memory", "mountPath": "/dev/shm"},  # noqa: S108
            *(_mount(i, volume) for i, volume in enumerate(kubernetes.volumes)),
        ],
    }


def _environment(job: JobSpec, kubernetes: KubernetesSettings, network: NetworkProfile) -> list[Object]:
    threads = max(1, _cores(kubernetes.cpu_per_node) // job.processes_per_node)
    env = {
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
        # The user need not be known in the image.
        "HOME": "/tmp",  # noqa: S108
        "USER": "ranks",
        # Nodes may wait for each other's image longer than the ten minutes that torchrun would.
        "PET_RDZV_CONF": f"join_timeout={max(1, math.ceil(job.time_limit_s))}",
    }
    if not job.gpus:
        # Where the NVIDIA runtime is the default, a pod that asks for no GPU is shown all.
        env |= {"CUDA_VISIBLE_DEVICES": "", "NVIDIA_VISIBLE_DEVICES": "void"}
    env |= network_environment(network) | dict(job.env) | kubernetes.env
    return [
        *({"name": name, "valueFrom": {"fieldRef": {"fieldPath": field}}} for name, field in _OF_THE_POD.items()),
        *({"name": name, "value": _literal(value)} for name, value in env.items()),
        *(
            {"name": name, "valueFrom": {"secretKeyRef": {"name": secret.name, "key": secret.key}}}
            for name, secret in kubernetes.secret_env.items()
        ),
    ]


_OF_THE_POD = {"PET_LOCAL_ADDR": "status.podIP", "NODE_NAME": "spec.nodeName"}
"""Ranks meet by address: a name of a pod may not be known yet where another looks it up."""


def _resources(job: JobSpec, kubernetes: KubernetesSettings) -> Object:
    wanted: dict[str, str] = _given({"cpu": kubernetes.cpu_per_node, "memory": kubernetes.memory_per_node})
    if job.gpus:
        wanted |= {kubernetes.gpu_resource: str(job.processes_per_node)} | kubernetes.resources
    return {"requests": wanted, "limits": dict(wanted)} if wanted else {}


def _source(volume: VolumeSettings) -> Object:
    if volume.claim is not None:
        return {"persistentVolumeClaim": _given({"claimName": volume.claim, "readOnly": volume.read_only or None})}
    if volume.host_path is not None:
        return {"hostPath": {"path": volume.host_path, "type": "Directory"}}
    if volume.storage_class is None:
        return {"emptyDir": {"sizeLimit": volume.size}}
    claim = {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": volume.storage_class,
        "resources": {"requests": {"storage": volume.size}},
    }
    return {"ephemeral": {"volumeClaimTemplate": {"spec": claim}}}


def _mount(index: int, volume: VolumeSettings) -> Object:
    return _given(
        {
            "name": f"volume-{index}",
            "mountPath": volume.mount_path,
            "subPath": volume.sub_path,
            "readOnly": volume.read_only or None,
        }
    )


def _cores(quantity: str | None) -> int:
    if quantity is None:
        return 1
    return int(float(quantity.removesuffix("m")) / (1000 if quantity.endswith("m") else 1))


def _literal(text: str) -> str:
    """Kubernetes replaces ``$(NAME)`` and ``$$`` in commands and values; doubled, a dollar is a dollar."""
    return text.replace("$", "$$")


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
