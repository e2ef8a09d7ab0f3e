"""The objects of a job, whole, valid for every supported Kubernetes, and what cannot stand in them."""

import copy
import dataclasses
import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from pydantic import ValidationError

from flows.preflight import check_experiment, check_pool
from tasks.contracts.cluster_settings import ClusterCheck
from tasks.contracts.job import JobSpec
from tasks.contracts.kubernetes_settings import KubernetesSettings
from tasks.contracts.overrides import SettingsError
from tasks.contracts.pool_settings import PoolSettings
from tasks.contracts.run_folder import RunFolder
from tasks.contracts.settings import Experiment
from tasks.pool.kubernetes_objects import object_name, render_job, render_service

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
OLDEST, NEWEST = "1.31.0", "1.37.0"
JOB = JobSpec(
    "run-train-adapter",
    "tasks.training",
    {},
    "/shared/runs/run/jobs/train_adapter",
    num_nodes=2,
    processes_per_node=8,
    gpus=True,
    env={"PYTHONPATH": "/shared/it's code", "LINES": "a\nb $(HOME) $$x", "TMPDIR": "/scratch/run"},
    time_limit_s=14_400,
)
ATTEMPT = Path("/shared/runs/run/jobs/train_adapter/001")
TOKEN = "0f1e2d3c4b5a"
SHARED = {"mount_path": "/shared", "claim": "shared"}
FULL = KubernetesSettings(
    namespace="team",
    image="registry.example/proving-ground:1",
    image_pull_policy="Always",
    image_pull_secrets=("registry",),
    python="/venv/bin/python",
    volumes=(
        SHARED | {"sub_path": "proving-ground"},
        {"mount_path": "/scratch", "size": "500Gi", "storage_class": "local-nvme"},
        {"mount_path": "/models", "host_path": "/mnt/models", "read_only": True},
    ),
    cpu_per_node="64",
    memory_per_node="1400Gi",
    resources={"rdma/rdma_shared_device_a": "1"},
    shared_memory="64Gi",
    lock_memory=True,
    run_as_user=0,
    node_selector={"node.kubernetes.io/instance-type": "gpu-h100"},
    tolerations=({"key": "nvidia.com/gpu", "effect": "NoSchedule"},),
    spread_over="kubernetes.io/hostname",
    queue="team-queue",
    required_topology="cloud.provider.com/topology-rack",
    priority_class="high",
    runtime_class="nvidia",
    service_account="ranks",
    env={"NCCL_IB_HCA": "mlx5"},
    secret_env={"HF_TOKEN": {"name": "hub", "key": "token"}},
    labels={"team": "poc"},
    annotations={"k8s.v1.cni.cncf.io/networks": "ib-network"},
)
SMALL = KubernetesSettings(image="proving-ground", python="python3", volumes=(SHARED,))
SMALL_JOB = dataclasses.replace(JOB, gpus=False, processes_per_node=1, num_nodes=1, env={})
CASES = {"full": (JOB, FULL), "small": (SMALL_JOB, SMALL)}


def objects(name: str) -> list[dict]:
    job, settings = CASES[name]
    rendered = render_job(job, ATTEMPT, TOKEN, settings)
    return [rendered, render_service(rendered, "00000000-0000-0000-0000-000000000001")]


@pytest.mark.parametrize("name", CASES)
def test_the_whole_objects(name):
    assert yaml.safe_dump_all(objects(name), sort_keys=False) == (GOLDEN / f"kubernetes-{name}.yaml").read_text()


@pytest.mark.parametrize("version", [OLDEST, "1.36.0", NEWEST])
@pytest.mark.parametrize("name", CASES)
def test_every_field_is_known_to_the_oldest_and_the_newest_kubernetes(name, version):
    for rendered in objects(name):
        kubernetes_validate.validate(rendered, version, strict=True)


def test_the_validation_sees_a_field_that_does_not_exist():
    broken = copy.deepcopy(objects("small")[0])
    broken["spec"]["template"]["spec"]["containers"][0]["evn"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="evn"):
        kubernetes_validate.validate(broken, NEWEST, strict=True)


def test_the_restricted_pod_security_level_admits_the_pods_by_default():
    pod = objects("small")[0]["spec"]["template"]["spec"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] != 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    assert {kind for volume in pod["volumes"] for kind in volume if kind != "name"} <= allowed
    for container in pod["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_kubernetes_reads_no_variable_into_what_we_pass():
    """``$(HOME)`` in a command or a value would be replaced, and ``$$`` would lose a dollar."""

    def as_kubernetes_reads(text: str) -> str:
        return re.sub(r"\$\$|\$\((\w+)\)", lambda m: "$" if m[0] == "$$" else f"<{m[1]}>", text)

    odd = Path("/shared/$(HOSTNAME)/$$/001")
    job = dataclasses.replace(JOB, folder=str(odd.parent))
    container = render_job(job, odd, TOKEN, FULL)["spec"]["template"]["spec"]["containers"][0]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert as_kubernetes_reads(env["LINES"]) == "a\nb $(HOME) $$x"
    assert str(odd) in [as_kubernetes_reads(word) for word in container["command"]]


NAMES = ["run-train-adapter", "A_b.C", "2026-11-24", "x" * 200, "ümläut", "...", "a" * 40 + "-" + "b" * 40]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attempt", ["001", "1234"])
def test_a_jobs_name_is_a_dns_label_that_leaves_room_for_its_pods(name, attempt):
    made = object_name(dataclasses.replace(JOB, name=name), Path(f"/shared/{name}/{attempt}"))
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", made)
    assert len(f"{made}-1023") <= 63


def test_names_that_dns_cannot_tell_apart_are_told_apart():
    made = {object_name(dataclasses.replace(JOB, name=n), Path(f"/shared/{n}/001")) for n in ("a_b", "a-b", "A.B")}
    assert len(made) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folder": "/home/me/runs"}, r"folder /home/me/runs is on no shared volume .*/shared is mounted"),
        ({"folder": "/shared-not/runs"}, "on no shared volume"),
        ({"folder": "/shared/../etc"}, "on no shared volume"),
        ({"folder": "/models/runs"}, "on no shared volume"),
        ({"folder": "/scratch/runs"}, "on no shared volume"),
        ({"log_folder": "/var/log/runs"}, "log folder /var/log/runs"),
        ({"env": {"TMPDIR": "/local"}}, "storage.scratch=/local is on no volume of the pods"),
    ],
)
def test_what_the_pods_could_not_see_is_refused_before_anything_is_made(changes, message):
    with pytest.raises(ValueError, match=message):
        render_job(dataclasses.replace(JOB, **changes), ATTEMPT, TOKEN, FULL)


def test_a_run_whose_pods_could_not_work_is_refused_before_its_first_stage(tmp_path):
    pool = {"backend": "kubernetes", "gpus": False, "kubernetes": {"image": "image", "volumes": [SHARED]}}
    values = {"model": {"name": "embedded"}, "dataset": {"sources": "embedded", "max_rows": 420}, "pool": pool}
    experiment = Experiment.model_validate(values | {"storage": {"shared": str(tmp_path)}})
    with pytest.raises(SettingsError, match=f"{tmp_path} is on no shared volume of the pods"):
        check_experiment(experiment, RunFolder(experiment.storage, "run"))


def test_scratch_of_the_jobs_machines_is_not_looked_for_on_the_flows(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    values = {"shared": str(tmp_path / "shared"), "scratch": str(blocked / "scratch"), "min_free_gbytes": 0}
    check = ClusterCheck.model_validate({"pool": {"backend": "slurm"}, "storage": values})
    check_pool(check)
    here = check.model_copy(update={"pool": PoolSettings.model_validate({"backend": "local", "gpus": False})})
    with pytest.raises(SettingsError, match=r"storage\.scratch=.*cannot be made"):
        check_pool(here)


def test_without_an_image_it_says_which_setting_is_missing():
    with pytest.raises(ValueError, match=r"pool\.kubernetes\.image is empty"):
        render_job(JOB, ATTEMPT, TOKEN, FULL.model_copy(update={"image": None}))


@pytest.mark.parametrize(
    "values",
    [
        {"namespace": "Team"}, {"namespace": "a\n"}, {"namespace": "a.b"}, {"image": "a b"}, {"image": "https://host/image"},
        {"memory_per_node": "lots"}, {"cpu_per_node": "-1"}, {"queue": "a/b"}, {"env": {"a b": "c"}},
        {"env": {"HF_TOKEN": "hf_abc"}}, {"env": {"AWS_SECRET_ACCESS_KEY": "abc"}}, {"env": {"DB_PASSWORD": "abc"}},
        {"secret_env": {"HF_TOKEN": "hf_abc"}}, {"labels": {"prefect.io/flow-run-id": "1"}}, {"labels": {"a": "b c"}},
        {"labels": {"proving-ground/attempt": "a"}}, {"annotations": {"proving-ground/folder": "/a"}},
        {"volumes": [{"mount_path": "/shared"}]}, {"volumes": [{"mount_path": "shared", "claim": "a"}]},
        {"volumes": [{"mount_path": "/shared", "claim": "a", "host_path": "/b"}]},
        {"volumes": [SHARED, SHARED]}, {"volumes": [{"mount_path": "/tmp", "claim": "a"}]},
        {"volumes": [{"mount_path": "/shared", "claim": "a", "sub_path": "../etc"}]},
        {"volumes": [{"mount_path": "/shared", "claim": "a", "storage_class": "b"}]},
        {"tolerations": [{"key": "a", "value": "b"}]}, {"tolerations": [{"operator": "Equal"}]},
        {"required_topology": "rack"}, {"keep_finished_s": 0}, {"unknown": 1},
    ],
)  # fmt: skip
def test_settings_that_kubernetes_would_refuse_are_refused_at_once(values):
    with pytest.raises(ValidationError):
        KubernetesSettings(**values)


def test_prefects_worker_would_take_no_object_for_its_own():
    assert "prefect.io" not in yaml.safe_dump_all(objects("full"))


def test_the_settings_are_a_form_with_every_field_described():
    schema = PoolSettings.model_json_schema()
    for kind in ("KubernetesSettings", "VolumeSettings", "TolerationSettings", "SecretReference"):
        fields = schema["$defs"][kind]["properties"]
        assert [name for name, field in fields.items() if not field.get("description")] == []
