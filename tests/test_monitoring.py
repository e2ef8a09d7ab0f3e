"""Dashboards and alerts: every query parses, asks for what is exported, and each alert fires on the series that it is for."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from infra.docker.make_secrets import PREFECT_AUTH, PREFECT_PASSWORD, make_secrets
from infra.monitoring.textfile import HELP, samples
from tasks.check_cluster import write
from tasks.cluster.report import build_report
from tasks.contracts.cluster_report import Figure, Placed, Report, Status
from tasks.contracts.cluster_settings import ClusterCheck
from tasks.contracts.deployments import deployment_values
from tasks.contracts.files import link, write_json
from tasks.contracts.job import JobSpec
from tasks.contracts.prometheus_text import render
from tasks.contracts.run_folder import STAGES, CheckFolder
from tasks.contracts.settings import Experiment, StorageSettings
from tests.cluster.clusters import Cluster
from tests.conftest import REPOSITORY
from tests.stack.compose import read_compose
from tests.test_kubernetes_manifests import OBJECTS, SERVERS, pod_of

FOLDER = REPOSITORY / "infra" / "monitoring"
ALERTS = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
TESTS = yaml.safe_load((FOLDER / "alerts.test.yaml").read_text())
DASHBOARDS = sorted(FOLDER.glob("dashboard-*.json"))
OF_A_GPU = {"gpu", "UUID", "device", "modelName", "Hostname"}
OF_A_FILESYSTEM = {"device", "fstype", "mountpoint"}
# Of NVIDIA's DCGM exporter's default counters, the node exporter, and Prometheus itself; with their labels.
OTHERS = {
    "DCGM_FI_DEV_GPU_UTIL": OF_A_GPU,
    "DCGM_FI_DEV_FB_USED": OF_A_GPU,
    "DCGM_FI_DEV_FB_FREE": OF_A_GPU,
    "DCGM_FI_DEV_POWER_USAGE": OF_A_GPU,
    "DCGM_FI_DEV_GPU_TEMP": OF_A_GPU,
    "DCGM_FI_DEV_XID_ERRORS": OF_A_GPU,
    "node_filesystem_avail_bytes": OF_A_FILESYSTEM,
    "node_filesystem_size_bytes": OF_A_FILESYSTEM,
    "up": set(),
    "probe_success": set(),
}
OURS = {
    "training_tokens_per_s_per_gpu": {"run"},
    "training_loss": {"run"},
    "training_step": {"run"},
    "training_point_timestamp_seconds": {"run"},
    "job_waiting_seconds": {"run", "stage"},
    "job_ended": {"run", "stage", "state"},
    "cluster_check_status": {"cluster", "verdict"},
    "cluster_check_finished_seconds": {"cluster"},
    "cluster_check_gates": {"cluster", "verdict"},
    "cluster_check_figure": {"cluster", "stage", "figure", "place", "size_bytes", "peer"},
    "written_timestamp_seconds": set(),
}
LABELS = OTHERS | {f"proving_ground_{name}": labels for name, labels in OURS.items()}
EVERY_SERIES_HAS = {"job", "instance"}
EXPORTED = {*OTHERS, *(f"proving_ground_{name}" for name in HELP)}
# `make tools` puts it beside Python.
PROMTOOL = shutil.which("promtool", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool here: make tools brings one")


def rules() -> list[dict]:
    return [rule for group in ALERTS["groups"] for rule in group["rules"]]


def metrics_in(query: str) -> set[str]:
    return set(re.findall(r"\b((?:DCGM|node|proving_ground|probe)_\w+|up(?=\{))", query))


def unknown_metrics(query: str) -> set[str]:
    return metrics_in(query) - EXPORTED


def unknown_labels(query: str, legend: str = "") -> set[str]:
    """Labels that a query or its legend goes by and none of its metrics has: Prometheus takes them for empty."""
    grouped = re.findall(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)", query)
    asked = set(re.findall(r"\w+", " ".join(grouped)))
    asked |= set(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', query)) | set(re.findall(r"{{\s*(\w+)\s*}}", legend))
    return asked - EVERY_SERIES_HAS.union(*(LABELS.get(name, set()) for name in metrics_in(query)))


def queries(dashboard: dict) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def variable_problems(dashboard: dict) -> list[str]:
    found = []
    variables = dashboard["templating"]["list"]
    sources = {f"${{{entry['name']}}}" for entry in variables if entry["type"] == "datasource"}
    asking = [entry for entry in variables if entry["type"] == "query"]
    for entry in asking:
        query = entry["query"]["query"]
        match = re.fullmatch(r"label_values\((\w+), (\w+)\)", query)
        if not match or match[1] not in EXPORTED or match[2] not in LABELS[match[1]]:
            found.append(f"${entry['name']} is filled from {query}")
    panels = dashboard["panels"]
    for entry in (*asking, *panels, *(target for panel in panels for target in panel["targets"])):
        if entry.get("datasource", {}).get("uid") not in sources:
            found.append(f"{entry.get('title') or entry.get('name') or entry['expr']} has a data source of its own")
    return found


def dashboard_problems(dashboard: dict) -> list[str]:
    found = variable_problems(dashboard)
    ids = [panel["id"] for panel in dashboard["panels"]]
    if len(set(ids)) < len(ids):
        found.append("two panels of one id")
    places: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        grid = panel["gridPos"]
        cells = {
            (x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])
        }
        if places & cells or grid["x"] + grid["w"] > 24:
            found.append(f"{panel['title']} lies over another panel")
        places |= cells
        if not panel["description"] or not panel["fieldConfig"]["defaults"].get("unit"):
            found.append(f"{panel['title']} has no description or no unit")
        for target in panel["targets"]:
            found += [f"{panel['title']} asks for {name}" for name in unknown_metrics(target["expr"])]
            missing = unknown_labels(target["expr"], target["legendFormat"])
            found += [f"{panel['title']}: no metric has the label {name}" for name in missing]
            variables = {entry["name"] for entry in dashboard["templating"]["list"]}
            found += [f"{panel['title']}: ${name}" for name in set(re.findall(r"\$(\w+)", target["expr"])) - variables]
    return found


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.name)
def test_a_dashboard_asks_for_what_there_is(file):
    assert dashboard_problems(json.loads(file.read_text())) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["panels"][0]["targets"][0].update(expr="DCGM_FI_DEV_GPU_UTILS"), "asks for DCGM_FI_DEV_GPU_UTILS"),
        (lambda d: d["panels"][0]["targets"][0].update(expr='up{job="$cluster"}'), "$cluster"),
        (lambda d: d["panels"][1].update(id=1), "two panels of one id"),
        (lambda d: d["panels"][1]["gridPos"].update(x=0), "lies over another panel"),
        (lambda d: d["panels"][0].update(description=""), "no description"),
        (
            lambda d: d["templating"]["list"][1]["query"].update(query="label_values(DCGM_UTIL, Hostname)"),
            "$node is fi",
        ),
        (lambda d: d["templating"]["list"][1]["query"].update(query="label_values(up, node)"), "$node is filled from"),
        (lambda d: d["templating"]["list"][1]["datasource"].update(uid="P1"), "node has a data source of its own"),
        (lambda d: d["panels"][0]["datasource"].update(uid="P1"), "GPU use has a data source of its own"),
        (lambda d: d["panels"][0]["targets"][0].pop("datasource"), "has a data source of its own"),
        (lambda d: d["panels"][0]["targets"][0].update(expr="avg by (host) (DCGM_FI_DEV_GPU_UTIL)"), "the label host"),
        (lambda d: d["panels"][0]["targets"][0].update(expr='DCGM_FI_DEV_GPU_UTIL{node="a"}'), "the label node"),
        (lambda d: d["panels"][0]["targets"][0].update(legendFormat="{{node}}"), "the label node"),
    ],
)
def test_a_broken_dashboard_is_seen(change, said):
    dashboard = copy.deepcopy(json.loads(DASHBOARDS[0].read_text()))
    change(dashboard)
    assert any(said in problem for problem in dashboard_problems(dashboard))


def test_alerts_ask_for_what_there_is_and_say_what_to_do():
    for rule in rules():
        assert not unknown_metrics(rule["expr"]), rule["alert"]
        said = re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values()))
        assert not unknown_labels(rule["expr"], "".join(f"{{{{{name}}}}}" for name in said)), rule["alert"]
        assert rule["annotations"].keys() == {"summary", "action"}
        assert rule["labels"]["severity"] in ("page", "warn")


def test_alerts_and_dashboards_speak_of_what_is_scraped():
    settings = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    scraped = {job["job_name"] for job in settings["scrape_configs"]}
    asked = [rule["expr"] for rule in rules()] + [q for f in DASHBOARDS for q in queries(json.loads(f.read_text()))]
    assert set(re.findall(r'\bjob="([^"]+)"', " ".join(asked))) <= scraped
    assert settings["rule_files"] == ["alerts.yaml"]


def test_stages_in_alerts_are_those_of_a_run():
    asked = set(re.findall(r'\bstage="([^"]+)"', " ".join(rule["expr"] for rule in rules())))
    assert asked
    assert asked <= {*STAGES, "compare_models"}


def test_what_is_scraped_in_the_cluster_is_a_service_there():
    text = (FOLDER / "prometheus.yaml").read_text()
    found = set(re.findall(r"([\w-]+)\.(proving-ground[\w-]*):(\d+)", text))
    services = {
        (key[2], key[1], str(port["port"]))
        for key, o in OBJECTS.items()
        if key[0] == "Service"
        for port in o["spec"]["ports"]
    }
    assert {name for name, _, _ in found} == {"prefect", "mlflow"}
    assert found <= services
    [prefect] = [job for job in yaml.safe_load(text)["scrape_configs"] if job["job_name"] == "prefect"]
    assert prefect["metrics_path"] == "/api/metrics"
    [container] = pod_of(OBJECTS["Deployment", SERVERS, "prefect"])["containers"]
    switches = [read_compose({})["prefect"].environment, {e["name"]: e.get("value") for e in container["env"]}]
    assert [switch["PREFECT_SERVER_METRICS_ENABLED"] for switch in switches] == ["true", "true"]


def test_every_secret_that_is_read_here_is_one_that_is_made(tmp_path):
    asked = {
        name
        for file in FOLDER.rglob("*")
        if file.is_file()
        for name in re.findall(rb"/run/secrets/(\w+)", file.read_bytes())
    }
    make_secrets(tmp_path)
    assert {name.decode() for name in asked} == {PREFECT_PASSWORD} <= {file.name for file in tmp_path.iterdir()}
    [job] = [j for j in yaml.safe_load((FOLDER / "prometheus.yaml").read_text())["scrape_configs"] if "basic_auth" in j]
    first = (tmp_path / PREFECT_AUTH).read_text()
    assert first == f"{job['basic_auth']['username']}:{(tmp_path / PREFECT_PASSWORD).read_text()}"
    # A password that was given away is made anew: Prometheus' copy of it must not stay the old one.
    (tmp_path / PREFECT_AUTH).unlink()
    make_secrets(tmp_path)
    second = (tmp_path / PREFECT_AUTH).read_text()
    assert second != first
    assert second == f"admin:{(tmp_path / PREFECT_PASSWORD).read_text()}"


def test_the_cluster_that_no_alert_speaks_of_is_the_demos_alone():
    left_out = set(re.findall(r'cluster!="([^"]+)"', " ".join(rule["expr"] for rule in rules())))
    clusters = {
        name: deployment_values(name, "cluster-check", "check")["cluster"] for name in ("demo", "nightly", "acceptance")
    }
    assert left_out == {clusters.pop("demo")}
    assert not left_out & set(clusters.values())


def test_every_alert_has_series_on_which_it_fires():
    fired = {case["alertname"] for test in TESTS["tests"] for case in test["alert_rule_test"] if case.get("exp_alerts")}
    assert fired == {rule["alert"] for rule in rules()}


@needs_promtool
def test_alerts_fire_on_recorded_series_and_only_there():
    done = subprocess.run([PROMTOOL, "test", "rules", "alerts.test.yaml"], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("alert", [rule["alert"] for rule in rules()])
def test_an_alert_that_can_never_fire_fails_its_test(tmp_path, alert):
    broken = copy.deepcopy(ALERTS)
    for group in broken["groups"]:
        for rule in group["rules"]:
            if rule["alert"] == alert:
                rule["expr"] = f"({rule['expr']}) and on () vector(0) > 1"
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(broken))
    shutil.copy(FOLDER / "alerts.test.yaml", tmp_path)
    done = subprocess.run([PROMTOOL, "test", "rules", "alerts.test.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0


@needs_promtool
def test_every_query_of_a_dashboard_parses(tmp_path):
    found = [query for file in DASHBOARDS for query in queries(json.loads(file.read_text()))]
    as_rules = [{"record": f"query:{index}", "expr": query} for index, query in enumerate(found)]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": as_rules}]}))
    done = subprocess.run([PROMTOOL, "check", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_have_somebody_who_tells_people_of_them():
    settings = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    [manager] = settings["alerting"]["alertmanagers"]
    assert manager["file_sd_configs"] == [{"files": ["targets/alertmanager.json"]}]
    assert "Alertmanager" in (FOLDER / "README.md").read_text()


def test_the_dashboard_sees_the_filesystem_of_which_the_alert_speaks():
    [alert] = [rule["expr"] for rule in rules() if rule["alert"] == "SharedFilesystemFull"]
    [panel] = [q for file in DASHBOARDS for q in queries(json.loads(file.read_text())) if "node_filesystem" in q]
    mounts = set(re.findall(r"mountpoint=~?\"([^\"]+)", alert))
    assert mounts == set(re.findall(r"mountpoint=~?\"([^\"]+)", panel)) == {"/shared|/mnt/data"}


@needs_promtool
def test_the_scrape_configuration_is_prometheus_own():
    done = subprocess.run(
        [PROMTOOL, "check", "config", "--syntax-only", FOLDER / "prometheus.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def told(storage: Path, now: float = 0.0) -> dict[str, str]:
    """Values by series."""
    lines = render(list(samples(storage, now)), HELP).splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


def attempt(
    storage: Path, run: str, *, line: str | None = None, point: str | None = None, state: str | None = None
) -> None:
    experiment = Experiment.model_validate(
        {"model": {"name": "embedded"}, "dataset": {"sources": "rows.jsonl"}, "storage": {"shared": str(storage)}}
    )
    root = storage / "runs" / run
    folder = root / "jobs" / "train_adapter" / "001"
    folder.mkdir(parents=True)
    write_json(root / "experiment.json", {"experiment": experiment.model_dump(mode="json")})
    write_json(folder / "spec.json", asdict(JobSpec("x", "m", {}, str(folder.parent))))
    if line:
        (folder / "node-0.log").write_text(line)
    if point:
        (folder / "metrics.jsonl").write_text(point)
    if state:
        write_json(folder / "exit.json", {"state": state, "reason": ""})


def test_the_text_file_tells_waiting_running_and_ended_jobs_apart(tmp_path):
    metrics = {"train/loss": 1.5, "train/tokens_per_s_per_gpu": 2345.0}
    attempt(tmp_path, "waits")
    attempt(tmp_path, "runs", line="hello", point=json.dumps({"step": 7, "time": 1, "metrics": metrics}) + "\n")
    attempt(tmp_path, "ended", line="hello", state="FAILED")
    values = told(tmp_path, time.time() + 60)
    assert float(values['proving_ground_job_waiting_seconds{run="waits",stage="train_adapter"}']) >= 60
    assert float(values['proving_ground_job_waiting_seconds{run="runs",stage="train_adapter"}']) == 0
    assert float(values['proving_ground_training_tokens_per_s_per_gpu{run="runs"}']) == 2345
    assert float(values['proving_ground_training_step{run="runs"}']) == 7
    assert float(values['proving_ground_job_ended{run="ended",stage="train_adapter",state="FAILED"}']) == 1
    assert not any("job_ended" in key and "runs" in key for key in values)


def test_every_run_can_be_chosen_on_the_dashboard_one_that_waits_too(tmp_path):
    attempt(tmp_path, "waits")
    attempt(tmp_path, "ended", line="hello", state="FAILED")
    dashboard = json.loads((FOLDER / "dashboard-runs.json").read_text())
    [query] = [entry["query"]["query"] for entry in dashboard["templating"]["list"] if entry["name"] == "run"]
    metric = re.match(r"label_values\((\w+),", query)[1]
    runs = {re.search(r'run="(\w+)"', series)[1] for series in told(tmp_path) if series.startswith(metric)}
    assert runs == {"waits", "ended"}


@pytest.fixture(scope="module")
def report() -> Report:
    cluster = Cluster(2, 2)
    cluster.figure("devices", "memory_copy_gbytes_per_s", float("nan"), 3)
    report = build_report(cluster.evidence, "nightly", 1.79e9, 300.0)
    odd = Placed(stage="devices", place='a "place\\', figure=Figure(name="x_ms", value=1.0, peer="b\nc"))
    return report.model_copy(update={"figures": (*report.figures, odd)})


def check(storage: Path, name: str, report: Report, started: float, *, ended: bool = True) -> Path:
    folder = CheckFolder(StorageSettings(shared=str(storage)), name)
    folder.root.mkdir(parents=True)
    write_json(folder.check, {"check": ClusterCheck(cluster=report.cluster).model_dump(mode="json")})
    os.utime(folder.check, (started, started))
    if ended:
        # As a check itself writes it, every form of the report.
        write(report, folder.report, [])
    link(folder.latest, folder.root)
    return folder.verdict


def test_a_checks_figures_are_told_as_they_were_written(tmp_path, report):
    written = check(tmp_path, "nightly", report, 1).with_name("cluster-check.prom").read_text()
    values = told(tmp_path)
    assert [f"{key} {value}" for key, value in values.items() if "cluster_check" in key] == [
        line for line in written.splitlines() if not line.startswith("#")
    ]
    assert len(values) > 50
    assert float(values['proving_ground_cluster_check_finished_seconds{cluster="cluster"}']) == 1.79e9 + 300
    shown = [query for file in DASHBOARDS for query in queries(json.loads(file.read_text())) if "_figure{" in query]
    selected = [re.sub(r".*\{(.*)\}.*", r"\1", query) for query in shown]
    assert selected
    assert all(sum(f",{selector}," in f"{key}," for key in values) > 3 for selector in selected)


def test_the_metrics_and_labels_that_dashboards_are_held_against_are_those_that_are_written(tmp_path, report):
    point = {"step": 7, "time": 1, "metrics": {"train/loss": 1.5, "train/tokens_per_s_per_gpu": 2345.0}}
    attempt(tmp_path, "ended", line="hello", point=json.dumps(point) + "\n", state="FAILED")
    check(tmp_path, "nightly", report, 1)
    found: dict[str, set[str]] = {}
    for metric, labels, _ in samples(tmp_path, 0):
        found.setdefault(metric, set()).update(labels)
    assert found == OURS
    assert found.keys() == HELP.keys()


def test_of_each_cluster_the_newest_verdict_on_it_is_told(tmp_path, report):
    def as_(status: Status, cluster: str = "cluster") -> Report:
        return report.model_copy(update={"status": status, "cluster": cluster})

    check(tmp_path, "z-older", as_(Status.PASS), 1)
    check(tmp_path, "other", as_(Status.WARN, "other"), 2)
    check(tmp_path, "a-newer", as_(Status.FAIL), 3)
    check(tmp_path, "gave-way", as_(Status.SKIP), 4)
    check(tmp_path, "did-it-itself", as_(Status.ERROR).model_copy(update={"injected": "sleep"}), 5)
    check(tmp_path, "runs", as_(Status.PASS), 6, ended=False)
    verdicts = {key for key, value in told(tmp_path).items() if "check_status" in key and float(value) == 1}
    assert verdicts == {
        'proving_ground_cluster_check_status{cluster="cluster",verdict="FAIL"}',
        'proving_ground_cluster_check_status{cluster="other",verdict="WARN"}',
    }


@pytest.mark.parametrize("spoil", [lambda text: text[: len(text) // 2], lambda text: "{}"], ids=["half", "another's"])
def test_a_verdict_that_cannot_be_read_is_not_told_nor_an_older_one_in_its_place(tmp_path, report, capsys, spoil):
    attempt(tmp_path, "waits")
    check(tmp_path, "older", report, 1)
    newest = check(tmp_path, "newest", report, 3)
    newest.write_text(spoil(newest.read_text()))
    # What came after it is told all the same.
    check(tmp_path, "other", report.model_copy(update={"cluster": "other"}), 4)
    values = told(tmp_path)
    assert {re.search(r'cluster="(\w+)"', key)[1] for key in values if "cluster_check" in key} == {"other"}
    assert 'proving_ground_job_waiting_seconds{run="waits",stage="train_adapter"}' in values
    assert f"{newest} cannot be read" in capsys.readouterr().err
