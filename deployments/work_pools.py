"""The work pools, each with its base job template: how a worker starts a flow run.

`local` starts flows as processes beside the worker: on a laptop, and on a login node of Slurm. `kubernetes` starts each as a
pod, which in turn submits the GPU jobs; what those look like is ``pool.kubernetes``'s business, not the work pool's.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prefect.workers.process import ProcessWorker

from tasks.contracts.pool_settings import PoolSettings

WorkPoolName = Literal["local", "kubernetes"]
"""What a deployment or a site may name: a run in any other work pool would be scheduled and never started."""
NAMESPACE = PoolSettings().kubernetes.namespace
CLAIM = "proving-ground"
"""Claim of the shared folder (infra/kubernetes/training-pool/claim.yaml), mounted at the same path as in the jobs."""
SHARED = "/shared"
SCRATCH = "/scratch"
"""Empty in every flow pod; what infra/kubernetes/site.yaml names as storage.scratch."""
MLFLOW = "http://mlflow.proving-ground-servers:5000"
"""MLflow of infra/kubernetes/base; a site with its own names it in job_variables (env)."""
FLOW_ACCOUNT = "proving-ground-flow"
SECRETS = "proving-ground-flow"
"""Secret whose entries are the flow's environment: PREFECT_API_AUTH_STRING, MLFLOW_TRACKING_USERNAME and _PASSWORD, HF_TOKEN."""


@dataclass(frozen=True)
class WorkPool:
    """One work pool as it shall be."""

    name: WorkPoolName
    type: str
    description: str
    concurrency_limit: int | None
    base_job_template: Mapping[str, Any]


def work_pools() -> list[WorkPool]:
    """Every work pool that the deployments of any site use."""
    return [
        WorkPool(
            "local",
            "process",
            "Flows as processes beside the worker; 32 of them wait for their jobs at once.",
            32,
            ProcessWorker.get_default_base_job_template(),
        ),
        WorkPool(
            "kubernetes",
            "kubernetes",
            "Flows as pods that pass Pod Security restricted, see the shared folder and may submit jobs.",
            32,
            kubernetes_template(),
        ),
    ]


def kubernetes_template() -> dict[str, Any]:
    """Prefect's template of a Job, with what our namespace asks of pods. A flow needs neither a GPU nor root."""
    from prefect_kubernetes.worker import KubernetesWorker

    template: dict[str, Any] = copy.deepcopy(KubernetesWorker.get_default_base_job_template())
    manifest = template["job_configuration"]["job_manifest"]
    pod = manifest["spec"]["template"]["spec"]
    pod["securityContext"] = {
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "runAsGroup": 1000,
        "fsGroup": 1000,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    pod["volumes"] = [
        {"name": "shared", "persistentVolumeClaim": {"claimName": CLAIM}},
        {"name": "tmp", "emptyDir": {}},
        # Of runs whose jobs are the flow's own processes, as the demo's; a site's storage.scratch reaches them too.
        {"name": "scratch", "emptyDir": {}},
    ]
    # Time to write MLflow's end and to give the lease back when the run is cancelled.
    pod["terminationGracePeriodSeconds"] = 60
    [container] = pod["containers"]
    container["securityContext"] = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    mounts = {"shared": SHARED, "tmp": "/tmp", "scratch": SCRATCH}  # noqa: S108
    container["volumeMounts"] = [{"name": name, "mountPath": path} for name, path in mounts.items()]
    container["envFrom"] = [{"secretRef": {"name": SECRETS}}]
    defaults = {
        "namespace": NAMESPACE,
        "service_account_name": FLOW_ACCOUNT,
        "backoff_limit": 0,
        "finished_job_ttl": 86_400,
        "image_pull_policy": "IfNotPresent",
        "cpu_request": "500m",
        "cpu_limit": "2",
        "memory_request": "1Gi",
        "memory_limit": "4Gi",
        # A node may have to be started for it.
        "pod_watch_timeout_seconds": 900,
        "env": {
            "HOME": "/tmp",  # noqa: S108
            "PREFECT_HOME": "/tmp/prefect",  # noqa: S108
            "DO_NOT_TRACK": "1",
            "MLFLOW_TRACKING_URI": MLFLOW,
        },
    }
    properties = template["variables"]["properties"]
    if unknown := defaults.keys() - properties.keys():
        raise ValueError(f"prefect-kubernetes knows no job variable {sorted(unknown)} any more; see work_pools.py")
    for name, value in defaults.items():
        properties[name]["default"] = value
    return template
