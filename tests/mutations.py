"""Break files of infra, deployments and CI in ways that matter, and see a test fail: ``python -m tests.mutations [WORD]``.

Every mutation is made in a copy of the tracked files, where the tests that are about the file run; golden files are left out of
it, since they fail at every change and say nothing of whether it was wrong. Exit status 1: one was not seen. WORD narrows it to
the files that contain it.
"""

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

KUBERNETES, COMPOSE, MONITORING = (
    "tests/test_kubernetes_manifests.py",
    "tests/stack/test_compose.py",
    "tests/test_monitoring.py",
)
TERRAFORM, WORKFLOWS, DEPLOYMENTS = (
    "tests/test_terraform.py",
    "tests/test_workflows.py",
    "tests/deployments/test_declared.py",
)
DATABASES, WIRING, RIGHTS = (
    "tests/test_databases.py",
    "tests/test_kubernetes_wiring.py",
    "tests/pool/test_kubernetes_access.py",
)


OUR_MODULES = {"tests", "infra", "deployments", "flows", "tasks"}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["pytest", "prefect", "prefect_kubernetes.settings", "mlflow", "kubernetes_validate", "hcl2"]
)


@dataclass(frozen=True)
class Mutation:
    """``before``, which stands in ``file``, becomes ``after``; ``tests`` must then fail."""

    file: str
    before: str
    after: str
    tests: str


BASE, DOCKER, TF = "infra/kubernetes/base/", "infra/docker/", "infra/terraform/nebius/"
MUTATIONS = [
    # A wrong field name.
    Mutation(BASE + "postgres.yaml", "terminationGracePeriodSeconds", "terminationGracePeriodSecond", KUBERNETES),
    Mutation(BASE + "backup.yaml", "concurrencyPolicy", "concurencyPolicy", KUBERNETES),
    Mutation(BASE + "prefect.yaml", "PREFECT_SERVER_DATABASE_HOST", "PREFECT_SERVER_DATABASE_HOTS", WIRING),
    Mutation(BASE + "mlflow.yaml", "MLFLOW_ARTIFACTS_DESTINATION, value", "MLFLOW_ARTIFACT_DESTINATION, value", WIRING),
    Mutation(BASE + "worker.yaml", "OBSERVER_NAMESPACES", "OBSERVER_NAMESPACE", WIRING),
    Mutation(
        DOCKER + "compose.yaml",
        "PREFECT_SERVER_API_AUTH_STRING_FROM_FILE",
        "PREFECT_SERVER_AUTH_STRING_FROM_FILE",
        COMPOSE,
    ),
    Mutation(DOCKER + "compose.yaml", "MLFLOW_SERVER_ALLOWED_HOSTS", "MLFLOW_ALLOWED_HOSTS", COMPOSE),
    # A reference to what is not there.
    Mutation(BASE + "prefect.yaml", "targetPort: http}", "targetPort: htp}", WIRING),
    Mutation(BASE + "mlflow.yaml", "tcpSocket: {port: http}", "tcpSocket: {port: htp}", WIRING),
    Mutation(BASE + "mlflow-upgrade.yaml", "image: proving-ground-servers", "image: proving-ground-server", WIRING),
    Mutation(
        BASE + "worker.yaml",
        "http://prefect.proving-ground-servers:4200",
        "http://prefect.proving-ground-server:4200",
        WIRING,
    ),
    Mutation(
        BASE + "worker.yaml",
        "secretKeyRef: {name: proving-ground-flow,",
        "secretKeyRef: {name: proving-ground-flows,",
        WIRING,
    ),
    Mutation(BASE + "backup.yaml", "claimName: backups", "claimName: backup", KUBERNETES),
    Mutation(BASE + "backup.yaml", "/scripts/backup.sh", "/scripts/back-up.sh", WIRING),
    Mutation(BASE + "kustomization.yaml", "- backup.yaml\n", "", WIRING),
    Mutation("infra/kubernetes/kueue/queues.yaml", "clusterQueue: proving-ground", "clusterQueue: proving", WIRING),
    Mutation("infra/kubernetes/kueue/queues.yaml", "- name: h100-8gpu", "- name: h100-8-gpu", WIRING),
    Mutation("infra/kubernetes/overlays/generic/kustomization.yaml", "name: proving-ground}", "name: proving}", WIRING),
    Mutation(
        "infra/kubernetes/overlays/nebius/kustomization.yaml",
        "{name: proving-ground-servers,",
        "{name: servers,",
        WIRING,
    ),
    Mutation(
        "infra/kubernetes/overlays/kind/kustomization.yaml", "{kind: StatefulSet}", "{kind: StatefulSets}", WIRING
    ),
    Mutation(
        "infra/kubernetes/training-pool/accounts.yaml",
        "verbs: [create, get, delete]",
        "verbs: [create, get]",
        RIGHTS,
    ),
    Mutation(
        BASE + "worker.yaml",
        "verbs: [create, get, list, watch, delete]",
        "verbs: [create, get, list, watch]",
        WIRING,
    ),
    Mutation(DOCKER + "Dockerfile.flows", "/app/infra/docker/with_secrets.py", "/app/infra/with_secrets.py", COMPOSE),
    Mutation(DOCKER + "compose.yaml", "/api/health'", "/health'", COMPOSE),
    Mutation(DOCKER + "compose.yaml", "depends_on: {postgres:", "depends_on: {postgress:", COMPOSE),
    Mutation("infra/databases/backup.sh", "prefect mlflow mlflow_auth", "prefect mlflow", DATABASES),
    Mutation("infra/databases/kustomization.yaml", "backup.sh, restore.sh", "restore.sh", DATABASES),
    # A selector that selects nothing.
    Mutation(BASE + "postgres.yaml", "selector: {app: postgres}", "selector: {app: postgre}", WIRING),
    Mutation(BASE + "mlflow.yaml", "matchLabels: {app: mlflow}", "matchLabels: {app: mlfow}", WIRING),
    Mutation(
        BASE + "network-policies.yaml",
        "podSelector: {matchLabels: {app: prefect}}",
        "podSelector: {matchLabels: {app: prefekt}}",
        WIRING,
    ),
    Mutation(BASE + "network-policies.yaml", "values: [prefect, mlflow]}]", "values: [prefect, mlflo]}]", WIRING),
    Mutation(BASE + "network-policies.yaml", "port: 5432", "port: 5433", WIRING),
    Mutation(BASE + "network-policies.yaml", "metadata.name: proving-ground-servers", "metadata.name: servers", WIRING),
    # A secret that is not mounted, or not made.
    Mutation(
        BASE + "postgres.yaml",
        "          - {key: mlflow_database_password, path: mlflow_database_password}\n",
        "",
        WIRING,
    ),
    Mutation(BASE + "mlflow.yaml", "        - {name: secrets, mountPath: /run/secrets, readOnly: true}\n", "", WIRING),
    Mutation(BASE + "mlflow.yaml", "{key: flask_key,", "{key: flask_keys,", WIRING),
    Mutation("infra/kubernetes/make_secrets.sh", '--from-file="$folder/prefect_auth" | apply', "| apply", WIRING),
    Mutation(
        DOCKER + "compose.yaml",
        "secrets: [prefect_database_password, prefect_auth]",
        "secrets: [prefect_auth]",
        COMPOSE,
    ),
    # A metric that nobody exports, a job that nobody scrapes.
    Mutation("infra/monitoring/dashboard-gpus.json", "DCGM_FI_DEV_GPU_UTIL", "DCGM_FI_DEV_GPU_UTILISATION", MONITORING),
    Mutation(
        "infra/monitoring/dashboard-runs.json",
        "proving_ground_job_waiting_seconds",
        "proving_ground_job_waits_seconds",
        MONITORING,
    ),
    Mutation("infra/monitoring/alerts.yaml", 'stage="train_adapter"', 'stage="training"', MONITORING),
    Mutation("infra/monitoring/alerts.yaml", "> 7200", "> 72000", MONITORING),
    Mutation(
        "infra/monitoring/alerts.test.yaml",
        "alertname: GpuHot\n    exp_alerts",
        "alertname: GpuHotter\n    exp_alerts",
        MONITORING,
    ),
    Mutation("infra/monitoring/prometheus.yaml", "job_name: prefect", "job_name: prefect-server", MONITORING),
    Mutation(
        "infra/monitoring/prometheus.yaml",
        "prefect.proving-ground-servers:4200",
        "prefect.proving-ground:4200",
        MONITORING,
    ),
    Mutation("infra/monitoring/textfile.py", '"job_ended": "1', '"job_over": "1', MONITORING),
    # A variable or a name that is not declared.
    Mutation(TF + "cluster.tf", "var.infiniband_fabric", "var.fabric", TERRAFORM),
    Mutation(TF + "outputs.tf", "nebius_compute_v1_filesystem.shared", "nebius_compute_v1_filesystem.this", TERRAFORM),
    Mutation(TF + "storage.tf", "size_gibibytes   = var", "size_gigabytes   = var", TERRAFORM),
    Mutation(TF + ".envrc.example", "sa_id", "service_account", TERRAFORM),
    Mutation(".github/workflows/images.yaml", "needs: image", "needs: images", WORKFLOWS),
    Mutation(".github/workflows/images.yaml", "matrix.target", "matrix.stage", WORKFLOWS),
    Mutation(".github/workflows/images.yaml", "steps.tags.outputs.tags", "steps.tag.outputs.tags", WORKFLOWS),
    Mutation(".github/workflows/images.yaml", "sbom: true", "sbom: false", WORKFLOWS),
    Mutation(
        ".github/workflows/images.yaml",
        "    - run: docker run",
        "    - if: matrix.name != 'servers'\n      run: docker run",
        WORKFLOWS,
    ),
    Mutation(".github/workflows/scan.yaml", "make audit", "make audits", WORKFLOWS),
    Mutation("infra/docker/compose.yaml", ", --app-name, basic-auth", "", COMPOSE),
    Mutation(
        "infra/docker/compose.yaml",
        "      PREFECT_SERVER_API_AUTH_STRING_FROM_FILE",
        "      PREFECT_SERVER_API_AUTH_STRINGS_FROM_FILE",
        COMPOSE,
    ),
    Mutation("infra/docker/compose.yaml", '    volumes: ["artifacts:/artifacts"]\n', "", COMPOSE),
    Mutation("infra/docker/compose.yaml", "      - postgres:/var/lib/postgresql/data\n", "", COMPOSE),
    Mutation("infra/docker/mlflow-auth.ini", "NO_PERMISSIONS", "MANAGE", COMPOSE),
    Mutation(BASE + "mlflow.yaml", ", --app-name, basic-auth", "", WIRING),
    Mutation(
        BASE + "prefect.yaml",
        "{name: PREFECT_SERVER_API_AUTH_STRING_FROM_FILE",
        "{name: PREFECT_API_KEY_FROM_FILE",
        WIRING,
    ),
    Mutation(BASE + "backup.yaml", '"30 1 * * *"', '"30 25 * * *"', WIRING),
    Mutation(BASE + "restore.yaml", "  suspend: true\n", "", WIRING),
    Mutation(BASE + "restore.yaml", "tail -n 1", "head -n 1", WIRING),
    Mutation(".github/workflows/ci.yaml", "persist-credentials: false", "persist-credentials: true", WORKFLOWS),
    Mutation("deployments/prefect.yaml", "num_epochs: 3", "num_epoch: 3", DEPLOYMENTS),
    Mutation("infra/slurm/site.yaml", "pool.slurm.partition", "pool.slurm.partitions", DEPLOYMENTS),
    Mutation("infra/kubernetes/site.yaml", "reconcile/left-runs", "reconcile/left", DEPLOYMENTS),
    Mutation("infra/docker/site.yaml", "work_pool", "workpool", DEPLOYMENTS),
]


def is_seen(mutation: Mutation, copy: Path) -> bool:
    """Whether the tests fail on the file as it was broken; it is mended again.

    Raises:
        ValueError: the file has nothing to break there.
    """
    file = copy / mutation.file
    text = file.read_text()
    if mutation.before not in text:
        raise ValueError(f"{mutation.file} has no {mutation.before!r}")
    file.write_text(text.replace(mutation.before, mutation.after))
    try:
        return not passes(mutation.tests, copy)
    finally:
        file.write_text(text)


def passes(tests: str, copy: Path) -> bool:
    """Of the checks themselves; those that break something on purpose, and golden files, are left out."""
    # From a process that has loaded what takes seconds, which most of sixty runs would spend on it.
    child = FORKS.Process(target=run_pytest, args=(tests, str(copy)))
    child.start()
    child.join()
    if child.exitcode not in (0, 1, 2):
        raise SystemExit(f"{tests}: pytest ended with {child.exitcode}; run it by hand")
    return child.exitcode == 0


def run_pytest(tests: str, copy: str) -> None:
    """In a process of its own, on the copy's modules instead of this checkout's."""
    for name in [name for name in sys.modules if name.partition(".")[0] in OUR_MODULES]:
        del sys.modules[name]
    sys.path[:] = [copy, *(path for path in sys.path if path not in ("", str(REPOSITORY)))]
    os.environ["PYTHONPATH"] = copy
    os.chdir(copy)
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    off = [word for plugin in ("cacheprovider", "xdist", "kmock") for word in ("-p", f"no:{plugin}")]
    options = [
        "-q",
        "-x",
        "--assert=plain",
        *off,
        "-k",
        "not whole_overlay and not broken and not misspelt and not never_fire",
    ]
    sys.exit(int(pytest.main([*options, tests])))


def copied(folder: Path) -> Path:
    """The tracked files, and those that are about to be."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    return folder


def main(word: str) -> int:
    chosen = [mutation for mutation in MUTATIONS if word in mutation.file]
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(Path(folder))
        if failing := [tests for tests in sorted({mutation.tests for mutation in chosen}) if not passes(tests, copy)]:
            raise SystemExit(f"these fail before anything is broken: {', '.join(failing)}")
        unseen = []
        for mutation in chosen:
            what = f"{mutation.file}: {mutation.before.strip()!r} -> {mutation.after.strip()!r}"
            seen = is_seen(mutation, copy)
            print("seen    " if seen else "NOT SEEN", what, flush=True)
            unseen += [] if seen else [what]
    print(f"{len(chosen) - len(unseen)} of {len(chosen)} seen")
    return 1 if unseen or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
