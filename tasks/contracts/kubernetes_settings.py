"""Where and how jobs run on a Kubernetes cluster. Secrets are named here, never written."""

import re
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from tasks.contracts.environment import EnvName, refuse_secrets
from tasks.contracts.frozen_settings import Settings

_LABEL = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_SUBDOMAIN = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*"

Namespace = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
"""A DNS label: lower-case letters, digits and '-', at most 63."""
ObjectName = Annotated[str, Field(pattern=f"^{_SUBDOMAIN}$", max_length=253)]
"""A DNS subdomain, as objects are named."""
Quantity = Annotated[
    str,
    # An assignment on the command line (`cpu_per_node=64`) is read as YAML, where that is a number.
    BeforeValidator(lambda value: str(value) if isinstance(value, int) and not isinstance(value, bool) else value),
    Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"),
]
"""An amount as Kubernetes writes it: `64`, `500m`, `1400Gi`."""
Key = Annotated[str, Field(pattern=f"^({_SUBDOMAIN}/)?{_LABEL}$", max_length=317)]
"""Name of a label, annotation, taint or resource, as `nvidia.com/gpu`."""
LabelValue = Annotated[str, Field(pattern=f"^({_LABEL})?$")]
FolderPath = Annotated[str, Field(pattern=r"^/[^:\x00-\x1f]*$")]
"""An absolute path."""

WATCHED_BY_PREFECT = "prefect.io/flow-run-id"
"""prefect-kubernetes' worker watches every Job with this label and ends flow runs by what it sees."""

OURS = "proving-ground/"
"""Prefix of the labels and annotations by which the pool finds a job's objects again."""
TAKEN = "/", "/tmp", "/dev/shm"  # noqa: S108 - folders of a pod, not of this machine
"""Where every pod has its own root, temporary files and shared memory."""


class VolumeSettings(Settings):
    """One folder in the pods: of a claim, of the node, or of the pod itself. Exactly one of `claim`, `host_path`, `size`."""

    mount_path: FolderPath
    """Where the pods see it. Shared storage must be at the same path where the flow runs."""
    claim: ObjectName | None = None
    """PersistentVolumeClaim in the namespace; ReadWriteMany where the job has several nodes."""
    host_path: FolderPath | None = None
    """Folder that the nodes themselves have mounted, at this path on each. Pod Security below `privileged` forbids it."""
    size: Quantity | None = None
    """Scratch: a folder on the node's disk that goes with the pod; a pod that writes more is evicted."""
    storage_class: ObjectName | None = None
    """With `size`: a volume of this class for each pod in place of the node's disk."""
    sub_path: str | None = Field(default=None, pattern=r"^[^/\x00-\x1f][^\x00-\x1f]*$")
    """Folder inside a claim that is mounted; empty: its root."""
    read_only: bool = False
    """Nothing may be written there, so runs cannot lie there."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("claim", "host_path", "size") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"volume {self.mount_path}: give one of claim, host_path and size, not {given or 'none'}")
        if self.storage_class is not None and self.size is None:
            raise ValueError(f"volume {self.mount_path}: storage_class goes with size; a claim has a class already")
        if self.sub_path is not None and (self.claim is None or ".." in PurePosixPath(self.sub_path).parts):
            raise ValueError(f"volume {self.mount_path}: sub_path={self.sub_path!r} goes with claim, and without '..'")
        if PurePosixPath(self.mount_path) in map(PurePosixPath, TAKEN):
            raise ValueError(f"volume: mount_path={self.mount_path} is taken by the pods themselves; choose another")
        return self


class TolerationSettings(Settings):
    """A taint that the pods accept."""

    key: Key | None = None
    """The taint's key; empty with `operator=Exists`: every taint."""
    operator: Literal["Equal", "Exists"] = "Exists"
    """Whether the taint's value counts."""
    value: LabelValue | None = None
    """The taint's value, with `operator=Equal`."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Empty: every effect."""

    @model_validator(mode="after")
    def _value_is_compared(self) -> Self:
        if self.operator == "Exists" and self.value is not None:
            raise ValueError(f"toleration {self.key}: a value is only compared with operator=Equal")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("toleration: operator=Equal needs a key")
        return self


class SecretReference(Settings):
    """A value of a Secret in the namespace."""

    name: ObjectName
    """The Secret."""
    key: str = Field(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253)
    """The entry in it."""


class KubernetesSettings(Settings):
    """Where on a Kubernetes cluster jobs run: an Indexed Job and a headless Service for each."""

    context: str | None = Field(default=None, min_length=1)
    """Context of the kubeconfig; empty: the pod's own service account inside a cluster, else the current context."""
    namespace: Namespace = "proving-ground"
    """Namespace of the jobs; it must exist (infra/kubernetes/training-pool makes one)."""
    image: str | None = Field(default=None, pattern=r"^[^\s]+$")
    """Container image with this project's Python packages."""
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    """When nodes pull the image."""
    image_pull_secrets: tuple[ObjectName, ...] = ()
    """Secrets in the namespace with which the image is pulled."""
    python: str | None = Field(default=None, pattern=r"^[^\x00-\x1f]+$")
    """Interpreter in the image; empty: the path of the one that submits."""
    volumes: tuple[VolumeSettings, ...] = ()
    """Shared storage, at the same path as where the flow runs, and scratch."""
    cpu_per_node: Quantity | None = None
    """Processors of each node for the job, as `64`."""
    memory_per_node: Quantity | None = None
    """Memory of each node for the job, as `1400Gi`; what is in shared memory counts."""
    gpu_resource: Key = "nvidia.com/gpu"
    """What the device plugin calls a GPU."""
    resources: dict[Key, Quantity] = Field(default_factory=dict)
    """Further devices of each node, as `rdma/rdma_shared_device_a: 1` for InfiniBand."""
    shared_memory: Quantity = "16Gi"
    """Largest size of /dev/shm, which NCCL and data loaders use; no more is taken than is written."""
    lock_memory: bool = False
    """Add the capability IPC_LOCK for RDMA. Only root can use it (`run_as_user=0`), and the namespace's Pod Security must be
    `privileged`: first let the container runtime lift the limit of locked memory."""
    node_selector: dict[Key, LabelValue] = Field(default_factory=dict)
    """Labels that the nodes must have."""
    tolerations: tuple[TolerationSettings, ...] = ()
    """Taints of the nodes that are accepted."""
    spread_over: Key | None = None
    """Label of nodes over whose values the pods are spread evenly, as `kubernetes.io/hostname`."""
    queue: ObjectName | None = None
    """Kueue's LocalQueue in the namespace; empty: no Kueue."""
    required_topology: Key | None = None
    """Kueue places all pods inside one domain of this label, as `cloud.provider.com/topology-rack`."""
    preferred_topology: Key | None = None
    """The same, if there is room."""
    priority_class: ObjectName | None = None
    """PriorityClass of the pods."""
    runtime_class: ObjectName | None = None
    """RuntimeClass of the pods, as `nvidia` on K3s."""
    service_account: ObjectName | None = None
    """Service account of the pods; it needs no right, and no token of it is mounted. Empty: the namespace's default."""
    run_as_user: int = Field(default=1000, ge=0)
    """User of the pods' processes. Files of runs belong to it: let the flow run as the same."""
    run_as_group: int = Field(default=1000, ge=0)
    """Group of the pods' processes, and of a claim's files where its driver can set it."""
    env: dict[EnvName, str] = Field(default_factory=dict)
    """Environment of the ranks, as `NCCL_IB_HCA: mlx5`; never a secret."""
    secret_env: dict[EnvName, SecretReference] = Field(default_factory=dict)
    """Environment of the ranks out of Secrets, as `HF_TOKEN: {name: hub, key: token}`."""
    labels: dict[Key, LabelValue] = Field(default_factory=dict)
    """Further labels of the Job and its pods."""
    annotations: dict[Key, str] = Field(default_factory=dict)
    """Annotations of the pods, as `k8s.v1.cni.cncf.io/networks: ib-network`."""
    lost_node_s: int = Field(default=60, ge=0)
    """A node that does not answer for this long (after Kubernetes noticed it) is lost, and the job goes on elsewhere."""
    termination_grace_s: int = Field(default=120, ge=1)
    """From the request to leave until processes are killed: time to save."""
    keep_finished_s: int = Field(default=86_400, ge=600)
    """Finished jobs stay in the cluster for this long, for `kubectl logs`; what they left lies on shared storage."""

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        refuse_secrets(value, "keep them in Secrets of the namespace and name those in pool.kubernetes.secret_env")
        return value

    @field_validator("labels")
    @classmethod
    def _not_prefects(cls, value: dict[str, str]) -> dict[str, str]:
        if WATCHED_BY_PREFECT in value:
            raise ValueError(
                f"{WATCHED_BY_PREFECT} would let Prefect's worker take the job for a flow run; leave it out"
            )
        return value

    @field_validator("labels", "annotations")
    @classmethod
    def _not_ours(cls, value: dict[str, str]) -> dict[str, str]:
        if ours := [key for key in value if key.startswith(OURS)]:
            raise ValueError(f"{ours}: {OURS} is how the pool marks what belongs to a job; use another prefix")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if twice := self.env.keys() & self.secret_env.keys():
            raise ValueError(f"{sorted(twice)} stand in env and in secret_env; a secret must not stand in env")
        paths = [PurePosixPath(volume.mount_path) for volume in self.volumes]
        if twice_mounted := sorted({str(path) for path in paths if paths.count(path) > 1}):
            raise ValueError(f"volumes: {twice_mounted} are mounted twice; give each its own mount_path")
        if self.required_topology and self.preferred_topology:
            raise ValueError("required_topology and preferred_topology: Kueue takes one of them")
        if (self.required_topology or self.preferred_topology) and not self.queue:
            raise ValueError(
                "required_topology and preferred_topology are Kueue's; set queue as well, or use spread_over"
            )
        if self.image is not None and re.search(r"://|@.*@", self.image):
            raise ValueError(f"image={self.image!r} is no image: registry/name:tag, without a scheme")
        return self
