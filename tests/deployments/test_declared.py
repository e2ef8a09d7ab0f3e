"""Every deployment against the code it starts, and the sites' files against the deployments."""

import copy
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import ValidationError

from deployments.declared import MAX_HEARTBEAT_S, PREFECT_YAML, REPOSITORY, Site, read_declared, read_site
from deployments.deploy import FORM, Change, as_switched, converge
from deployments.work_pools import WorkPoolName, kubernetes_template, work_pools
from flows.prefect_server import ServerProblem
from tasks.contracts.cluster_settings import ClusterCheck
from tasks.contracts.overrides import SettingsError, read_experiment, read_settings
from tasks.training.plan import plan_training

# Prefect's templates and blocks warn of what is theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

GLAIVE_ROWS = 110_000  # Of 112,960, less what is rejected or held out.


@pytest.fixture(scope="module")
def declared():
    return {deployment.full_name: deployment for deployment in read_declared(Site())}


def written(tmp_path: Path, change, only: str | None = None) -> Path:
    values = copy.deepcopy(yaml.safe_load(PREFECT_YAML.read_text()))
    change({entry["name"]: entry for entry in values["deployments"]})
    if only:
        values["deployments"] = [entry for entry in values["deployments"] if entry["name"] == only]
    file = tmp_path / "prefect.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_the_promised_deployments_are_there(declared):
    wanted = {"demo", "poc", "poc-reference", "poc-qwen2-7b", "demo-slurm", "scheduled"}
    assert {f"finetune/{name}" for name in wanted} <= declared.keys()


def test_every_batch_divides_over_its_pool(declared):
    for deployment in declared.values():
        if deployment.flow == "finetune":
            experiment = read_experiment(deployment.fields["parameters"]["experiment"])
            rows = experiment.dataset.max_rows or GLAIVE_ROWS
            plan = plan_training(experiment.training, num_rows=rows, world_size=experiment.pool.world_size)
            of_a_step = plan.world_size * plan.per_device_batch_size * plan.accumulation_steps
            assert of_a_step == experiment.training.global_batch_size, deployment.full_name


def test_the_references_numbers(declared):
    reference = read_experiment(declared["finetune/poc-reference"].fields["parameters"]["experiment"])
    training, lora = reference.training, reference.training.lora
    assert (training.global_batch_size, training.per_device_batch_size, training.learning_rate) == (512, 2, 2e-4)
    assert (training.num_epochs, training.max_steps_per_epoch, training.warmup_steps) == (3, 1000, 100)
    assert (lora.rank, lora.alpha, lora.dropout, training.weight_decay) == (64, 128, 0.1, 0.01)
    assert (training.save_every_steps, training.log_every_steps) == (500, 10)
    assert (training.lr_scheduler, training.gradient_checkpointing, training.precision) == ("cosine", True, "bfloat16")
    assert reference.dataset.max_length_tokens == 4096
    assert (reference.pool.num_nodes, reference.pool.processes_per_node) == (2, 8)
    gates = reference.gates
    assert (gates.min_exact_match, gates.max_final_loss, gates.min_tokens_per_s_per_gpu) == (0.85, 1.5, 2000)
    # 16 GPUs for 4 hours.
    assert (gates.min_inference_tokens_per_s, gates.max_hours, gates.max_gpu_hours) == (100, 4, 64)
    poc = read_experiment(declared["finetune/poc"].fields["parameters"]["experiment"])
    assert poc.gates == gates
    assert poc.training.lr_scheduler == "cosine"


def test_the_references_numbers_for_qwen2(declared):
    qwen = read_experiment(declared["finetune/poc-qwen2-7b"].fields["parameters"]["experiment"])
    training, lora = qwen.training, qwen.training.lora
    assert (training.global_batch_size, training.per_device_batch_size, training.learning_rate) == (128, 2, 2e-5)
    assert training.global_batch_size == 2 * 16 * 4
    assert (lora.rank, lora.alpha, training.lr_scheduler, training.precision) == (64, 128, "cosine", "bfloat16")
    assert qwen.dataset.max_length_tokens == 4096
    assert (qwen.gates.max_final_loss, qwen.gates.min_tokens_per_s_per_gpu) == (0.5, 2000)


def test_the_acceptance_is_held_to_the_limits_of_the_suite_it_replaces(declared):
    check = read_settings(ClusterCheck, declared["cluster-check/acceptance"].fields["parameters"]["check"])
    assert (check.thresholds.profile, check.training.shape) == ("reference", "lora-8b")
    assert (check.pool.num_nodes, check.pool.processes_per_node) == (2, 8)


def test_schedules_are_in_the_time_zones_that_they_were_meant_in(declared):
    found = {
        name: [(entry["cron"], entry["timezone"]) for entry in deployment.fields["schedules"]]
        for name, deployment in declared.items()
        if deployment.fields["schedules"]
    }
    assert found == {
        "finetune/scheduled": [("0 2 * * 0", "Europe/Amsterdam")],
        "cluster-check/nightly": [("30 3 * * *", "Etc/UTC")],
    }


def test_how_many_runs_of_a_deployment_there_are_at_once(declared):
    names = ("concurrency_limit", "collision_strategy")
    assert {name: tuple(deployment.fields[field] for field in names) for name, deployment in declared.items()} == {
        "finetune/demo": (None, None),
        "finetune/demo-slurm": (None, None),
        "finetune/poc": (1, "ENQUEUE"),
        "finetune/poc-reference": (1, "ENQUEUE"),
        "finetune/poc-qwen2-7b": (1, "ENQUEUE"),
        "finetune/scheduled": (1, "CANCEL_NEW"),
        "reconcile/left-runs": (1, "ENQUEUE"),
        "cluster-check/demo": (None, None),
        "cluster-check/nightly": (1, "ENQUEUE"),
        "cluster-check/acceptance": (None, None),
    }


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("training", {"num_epoch": 2}, "num_epoch"),
        ("training", {"learning_rate": "fast"}, "learning_rate"),
        ("model", {}, "model.name"),
    ],
)
def test_parameters_that_no_longer_fit_the_code_are_told_with_the_deployment(tmp_path, setting, value, said):
    def break_poc(entries):
        entries["poc"]["parameters"]["experiment"][setting] = value

    with pytest.raises(SettingsError, match=said) as caught:
        read_declared(Site(), written(tmp_path, break_poc))
    assert "poc (flows/finetune.py:finetune)" in str(caught.value)


def test_a_parameter_that_the_flow_does_not_take_is_told(tmp_path):
    def break_reconcile(entries):
        entries["left-runs"]["parameters"]["storge"] = "storage"

    with pytest.raises(SettingsError, match="storge"):
        read_declared(Site(), written(tmp_path, break_reconcile))


def test_a_schedule_without_a_time_zone_is_refused(tmp_path):
    def break_schedule(entries):
        del entries["scheduled"]["schedules"][0]["timezone"]

    with pytest.raises(SettingsError, match="schedules.0.timezone='': String should have at least 1 character"):
        read_declared(Site(), written(tmp_path, break_schedule))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (
            "scheduled",
            {"schedules": [{"cron": "0 25 * * 9", "timezone": "Etc/UTC"}]},
            "schedules.0.cron: '0 25 * * 9' is no cron; give minute, hour, day, month and weekday, as '0 2 * * 0'",
        ),
        (
            "scheduled",
            {"schedules": [{"cron": "0 2 * * 0", "timezone": "Europe/Amsterdamn"}]},
            'schedules.0.timezone: Invalid timezone: "Europe/Amsterdamn" (specify in IANA tzdata format',
        ),
        (
            "scheduled",
            {"schedules": [{"cron": "0 2 * * 0", "timezone": "Etc/UTC", "actve": True}]},
            "schedules.0.actve: unknown setting; there are: schedules.cron, schedules.timezone",
        ),
        (
            "scheduled",
            {"schedules": [{"cron": "0 2 * * 0", "timezone": "Etc/UTC", "active": "no"}]},
            "schedules.0.active='no': Input should be a valid boolean",
        ),
        (
            "scheduled",
            {"schedules": [{"cron": "0 2 * * 0", "timezone": "Etc/UTC", "day_or": False}]},
            "schedules.0.day_or=False: Input should be True",
        ),
        ("poc", {"concurrency_limit": 0}, "concurrency_limit.limit=0: Input should be greater than or equal to 1"),
        (
            "poc",
            {"concurrency_limit": {"limit": -1}},
            "concurrency_limit.limit=-1: Input should be greater than or equal to 1",
        ),
        (
            "poc",
            {"concurrency_limit": {"limit": 1, "collision_strategy": "WAIT"}},
            "concurrency_limit.collision_strategy='WAIT': Input should be 'ENQUEUE' or 'CANCEL_NEW'",
        ),
        ("poc", {"work_pool": {"name": "locale"}}, "work_pool.name='locale': Input should be 'local' or 'kubernetes'"),
        ("poc", {"descripton": "x"}, "descripton: unknown setting; did you mean description?"),
    ],
)
def test_what_prefect_would_refuse_or_never_start_is_told_with_the_deployment(tmp_path, name, change, said):
    with pytest.raises(SettingsError) as caught:
        read_declared(Site(), written(tmp_path, lambda entries: entries[name].update(change), only=name))
    where, what = str(caught.value).splitlines()
    assert where == f"{name} (flows/finetune.py:finetune):"
    assert said in what


def test_what_a_deployment_does_not_say_is_told(tmp_path):
    with pytest.raises(SettingsError, match="description: must be given"):
        read_declared(Site(), written(tmp_path, lambda entries: entries["poc"].pop("description")))


def test_two_deployments_of_one_name_are_refused(tmp_path):
    # The two demos are of two flows, each with its own.
    with pytest.raises(SettingsError) as caught:
        read_declared(Site(), written(tmp_path, lambda entries: entries["poc-reference"].update(name="poc")))
    assert str(caught.value).startswith("finetune/poc: there are 2 deployments of this name")


def test_every_work_pool_that_may_be_named_is_made():
    assert {pool.name for pool in work_pools()} == set(get_args(WorkPoolName))


def test_schedules_wait_for_a_site_to_switch_them_on(declared):
    assert [entry["active"] for entry in declared["finetune/scheduled"].fields["schedules"]] == [False]
    switched = {d.full_name: d for d in read_declared(Site(active_schedules=("finetune/scheduled",)))}
    assert [entry["active"] for entry in switched["finetune/scheduled"].fields["schedules"]] == [True]


def test_heartbeats_are_the_sites_whatever_shell_deploys_and_whatever_starts_the_worker(monkeypatch):
    monkeypatch.setenv("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "180")
    site = Site(heartbeat_s=60, job_variables={"image": "ours", "env": {"HF_HUB_OFFLINE": "1"}})
    for deployment in read_declared(site):
        variables = deployment.fields["job_variables"]
        assert variables["env"] == {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60", "HF_HUB_OFFLINE": "1"}
        assert variables["image"] == "ours"
    with pytest.raises(ValidationError, match="greater than or equal to 30"):
        Site(heartbeat_s=10)


def test_heartbeats_too_far_apart_are_refused_with_the_reason(tmp_path):
    # The nightly check gives a pool up after as long as three that stay away may last.
    [nightly] = [d for d in read_declared(Site()) if d.full_name == "cluster-check/nightly"]
    check = read_settings(ClusterCheck, nightly.fields["parameters"]["check"])
    assert check.pool.queue_limit_minutes * 60 == 3 * MAX_HEARTBEAT_S
    assert Site(heartbeat_s=MAX_HEARTBEAT_S).heartbeat_s == 300
    file = tmp_path / "site.yaml"
    file.write_text("heartbeat_s: 3600")
    with pytest.raises(SettingsError) as caught:
        read_site(file)
    assert str(caught.value).startswith(
        f"{file}: heartbeat_s: 3600 s between heartbeats are more than 300: only after 3"
    )
    assert "180 minutes by nobody; give 30 to 300" in str(caught.value)


@pytest.mark.parametrize("file", ["infra/slurm/site.yaml", "infra/kubernetes/site.yaml"])
def test_the_example_sites_fit_the_deployments(file):
    site = read_site(REPOSITORY / file)
    found = {deployment.full_name: deployment for deployment in read_declared(site)}
    poc = read_experiment(found["finetune/poc"].fields["parameters"]["experiment"])
    assert poc.pool.backend in ("slurm", "kubernetes")
    assert poc.storage.shared.startswith("/")
    assert found["reconcile/left-runs"].fields["parameters"]["storage"] == poc.storage.shared
    demo = read_experiment(found["finetune/demo"].fields["parameters"]["experiment"])
    assert demo.pool.backend == "local"


def test_composes_site_runs_flows_in_the_containers_code():
    site = read_site(REPOSITORY / "infra/docker/site.yaml")
    for deployment in read_declared(site):
        assert deployment.fields["work_pool_name"] == "local"
        [step] = deployment.fields["pull_steps"]
        assert step == {"prefect.deployments.steps.set_working_directory": {"directory": "/app"}}


@pytest.mark.parametrize("file", [None, "infra/slurm/site.yaml", "infra/kubernetes/site.yaml"])
def test_no_training_waits_for_ever_and_the_nightly_check_gives_way_everywhere(file):
    found = {d.full_name: d.fields["parameters"] for d in read_declared(read_site(file and REPOSITORY / file))}
    for name in ("poc", "poc-reference", "poc-qwen2-7b", "scheduled"):
        assert found[f"finetune/{name}"]["experiment"]["pool"]["queue_limit_minutes"] == 720
    assert found["cluster-check/nightly"]["check"]["pool"]["queue_limit_minutes"] == 15


def test_the_kubernetes_example_asks_for_nothing_that_a_plain_cluster_lacks():
    # A queue without Kueue suspends every job, a Secret that nobody made keeps every pod from starting.
    file = REPOSITORY / "infra/kubernetes/site.yaml"
    [poc] = [d for d in read_declared(read_site(file)) if d.full_name == "finetune/poc"]
    kubernetes = read_experiment(poc.fields["parameters"]["experiment"]).pool.kubernetes
    assert (kubernetes.queue, dict(kubernetes.secret_env)) == (None, {})
    # Each can be taken in, and what it names is what the overlays and the runbook make.
    [queue] = re.findall(r"# - pool\.kubernetes\.queue=(\S+)", file.read_text())
    queues = yaml.safe_load_all((REPOSITORY / "infra/kubernetes/kueue/queues.yaml").read_text())
    assert queue in [o["metadata"]["name"] for o in queues if o["kind"] == "LocalQueue"]
    [secret] = re.findall(r"# - \"pool\.kubernetes\.secret_env=.*name: (\w+)", file.read_text())
    assert f"create secret generic {secret} " in (REPOSITORY / "docs/runbook.md").read_text()


def test_a_site_that_names_what_is_no_deployment_is_refused():
    with pytest.raises(SettingsError, match="finetune/nightly"):
        read_declared(Site(active_schedules=("finetune/nightly",)))


def test_a_site_in_a_work_pool_that_nobody_makes_is_refused(tmp_path):
    file = tmp_path / "site.yaml"
    file.write_text("work_pool: gpu")
    with pytest.raises(SettingsError) as caught:
        read_site(file)
    assert str(caught.value) == f"{file}: work_pool='gpu': Input should be 'local' or 'kubernetes'"


@pytest.mark.parametrize(
    ("site", "lost", "seen"),
    [
        # The runs were moved and reconcile was not told.
        (Site(overrides=("storage.shared=/shared/s",)), "finetune/demo", "finetune/nothing"),
        (
            Site(parameters={"reconcile/left-runs": {"storage": "/shared/s"}}),
            "cluster-check/acceptance",
            "finetune/nothing",
        ),
        # One deployment alone is elsewhere; a check as well as a training.
        (
            Site(
                parameters={"cluster-check/demo": {"check": {"cluster": "laptop", "storage": {"shared": "/shared/s"}}}}
            ),
            "cluster-check/demo",
            "finetune/poc",
        ),
    ],
)
def test_runs_that_reconcile_would_not_look_at_are_refused(site, lost, seen):
    with pytest.raises(SettingsError) as caught:
        read_declared(site)
    [line] = [line for line in str(caught.value).splitlines() if line.startswith(f"{lost} ")]
    assert "and reconcile/left-runs looks into storage=" in line
    assert "'/shared/s'" in line
    assert "parameters: {reconcile/left-runs: {storage: " in line
    assert f"{seen} " not in str(caught.value)


def test_one_folder_written_in_two_ways_is_one():
    site = Site(overrides=("storage.shared=/shared/s/",), parameters={"reconcile/left-runs": {"storage": "/shared/s"}})
    assert len(read_declared(site)) == 10


def test_a_site_with_an_unknown_entry_is_refused(tmp_path):
    file = tmp_path / "site.yaml"
    file.write_text("workpool: gpu")
    with pytest.raises(SettingsError, match="workpool"):
        read_site(file)


def test_flow_pods_mount_whatever_their_site_says_of_storage():
    # Their root is read-only, and preflight makes these folders before anything else.
    pod = kubernetes_template()["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
    site = read_site(REPOSITORY / "infra/kubernetes/site.yaml")
    folders = [o.split("=", 1)[1] for o in site.overrides if re.match(r"storage\.(shared|logs|scratch)=", o)]
    folders += [values["storage"] for values in site.parameters.values() if "storage" in values]
    assert len(folders) >= 3
    for folder in folders:
        assert any(Path(folder).is_relative_to(path) for path in mounted), f"{folder} is on no mount: {mounted}"


def test_flow_pods_pass_pod_security_restricted():
    pod = kubernetes_template()["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_a_changed_form_is_one_line_of_the_difference():
    before = {"version": 1, FORM: {"properties": {"a": 1, "b": 2}}}
    after = {"version": 2, FORM: {"properties": {"a": 2, "c": 3}}}
    told = str(Change("deployment finetune/demo", before, after, lambda: None))
    assert told.splitlines() == [
        "~ deployment finetune/demo",
        "    the form: 3 entries changed with the code's settings",
        "    version: 1 -> 2",
    ]


def test_all_differences_are_shown_before_the_first_is_removed(capsys):
    there: list[str] = []
    shown: list[str] = []

    def differences():
        for name, needs in (("pool", None), ("deployment", None), ("automation", "deployment")):
            if name not in there and (needs is None or needs in there):
                yield Change(
                    name, None, {}, lambda name=name: (shown.append(capsys.readouterr().out), there.append(name))
                )

    assert converge(differences, is_dry_run=True) == 2
    assert (capsys.readouterr().out, there) == ("+ pool\n+ deployment\n", [])
    assert converge(differences, is_dry_run=False) == 3
    assert shown == ["+ pool\n+ deployment\n", "", "+ automation\n"]
    assert there == ["pool", "deployment", "automation"]


def test_what_stays_other_than_declared_is_told_and_not_tried_for_ever():
    with pytest.raises(ServerProblem, match=r"still other than declared.*\n~ pool\n    limit: 1 -> 2"):
        converge(lambda: [Change("pool", {"limit": 1}, {"limit": 2}, lambda: None)], is_dry_run=False)


def test_a_schedule_that_no_site_names_stays_as_somebody_switched_it():
    weekly = {"cron": "0 2 * * 0", "timezone": "Europe/Amsterdam", "active": False}
    assert as_switched([weekly], [weekly | {"active": True}]) == [weekly | {"active": True}]
    assert as_switched([weekly], []) == [weekly]
    assert as_switched([weekly | {"cron": "0 3 * * 0"}], [weekly | {"active": True}])[0]["active"] is False


def test_a_changed_schedule_shows_what_changes_and_nothing_else():
    weekly = {"cron": "0 2 * * 0", "timezone": "Europe/Amsterdam", "active": False}
    before, after = {"schedules": [weekly]}, {"schedules": [weekly | {"active": True}]}
    told = str(Change("deployment finetune/scheduled", before, after, lambda: None))
    assert told.splitlines() == ["~ deployment finetune/scheduled", "    schedules.0.active: False -> True"]


def test_a_site_reaches_cluster_checks_and_where_files_lie_reaches_everything():
    site = Site(
        overrides=("pool.backend=slurm", "pool.slurm.partition=gpu", "storage.shared=/shared/s", "training.seed=3"),
        parameters={"reconcile/left-runs": {"storage": "/shared/s"}},
    )
    declared = {d.full_name: d.fields["parameters"] for d in read_declared(site)}
    for name in ("nightly", "acceptance"):
        check = declared[f"cluster-check/{name}"]["check"]
        assert (check["pool"]["backend"], check["storage"]["shared"]) == ("slurm", "/shared/s")
    demo = declared["finetune/demo"]["experiment"]
    assert (demo["pool"]["backend"], demo["storage"]["shared"]) == ("local", "/shared/s")
    assert "seed" not in demo["training"]
    assert declared["finetune/poc"]["experiment"]["training"]["seed"] == 3
