"""Dashboards and alerts: every query parses, asks for what is exported, and each alert fires on the series that it is for."""

import copy
import json
import re
import shutil
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from flows.timing import STAGES
from infra.monitoring.textfile import HELP, render, samples
from tasks.contracts.files import write_json
from tasks.contracts.job import JobSpec
from tasks.contracts.settings import Experiment
from tests.conftest import REPOSITORY
from tests.test_kubernetes_manifests import OBJECTS

FOLDER = REPOSITORY / "infra" / "monitoring"
ALERTS = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
TESTS = yaml.safe_load((FOLDER / "alerts.test.yaml").read_text())
DASHBOARDS = sorted(FOLDER.glob("dashboard-*.json"))
# Of NVIDIA's DCGM exporter's default counters, the node exporter, and Prometheus itself.
OTHERS = {
    "DCGM_FI_DEV_GPU_UTIL",
    "DCGM_FI_DEV_FB_USED",
    "DCGM_FI_DEV_FB_FREE",
    "DCGM_FI_DEV_POWER_USAGE",
    "DCGM_FI_DEV_GPU_TEMP",
    "DCGM_FI_DEV_XID_ERRORS",
    "node_filesystem_avail_bytes",
    "node_filesystem_size_bytes",
    "up",
    "probe_success",
}
EXPORTED = OTHERS | {f"proving_ground_{name}" for name in HELP}
needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="no promtool here (Debian: prometheus); CI has one"
)


def rules() -> list[dict]:
    return [rule for group in ALERTS["groups"] for rule in group["rules"]]


def unknown_metrics(query: str) -> set[str]:
    names = set(re.findall(r"\b((?:DCGM|node|proving_ground|probe)_\w+|up(?=\{))", query))
    return names - EXPORTED


def queries(dashboard: dict) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def dashboard_problems(dashboard: dict) -> list[str]:
    found = []
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
    ],
)
def test_a_broken_dashboard_is_seen(change, said):
    dashboard = copy.deepcopy(json.loads(DASHBOARDS[0].read_text()))
    change(dashboard)
    assert any(said in problem for problem in dashboard_problems(dashboard))


def test_alerts_ask_for_what_there_is_and_say_what_to_do():
    for rule in rules():
        assert not unknown_metrics(rule["expr"]), rule["alert"]
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


def test_every_alert_has_series_on_which_it_fires():
    fired = {case["alertname"] for test in TESTS["tests"] for case in test["alert_rule_test"] if case.get("exp_alerts")}
    assert fired == {rule["alert"] for rule in rules()}


@needs_promtool
def test_alerts_fire_on_recorded_series_and_only_there():
    done = subprocess.run(["promtool", "test", "rules", "alerts.test.yaml"], cwd=FOLDER, capture_output=True, text=True)
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
    done = subprocess.run(
        ["promtool", "test", "rules", "alerts.test.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0


@needs_promtool
def test_every_query_of_a_dashboard_parses(tmp_path):
    found = [query for file in DASHBOARDS for query in queries(json.loads(file.read_text()))]
    as_rules = [{"record": f"query:{index}", "expr": query} for index, query in enumerate(found)]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": as_rules}]}))
    done = subprocess.run(["promtool", "check", "rules", file], capture_output=True, text=True)
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
        ["promtool", "check", "config", "--syntax-only", FOLDER / "prometheus.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


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
    text = render(list(samples(tmp_path, time.time() + 60)))
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['proving_ground_job_waiting_seconds{run="waits",stage="train_adapter"}']) >= 60
    assert float(values['proving_ground_job_waiting_seconds{run="runs",stage="train_adapter"}']) == 0
    assert float(values['proving_ground_training_tokens_per_s_per_gpu{run="runs"}']) == 2345
    assert float(values['proving_ground_training_step{run="runs"}']) == 7
    assert float(values['proving_ground_job_ended{run="ended",stage="train_adapter",state="FAILED"}']) == 1
    assert not any("job_ended" in key and "runs" in key for key in values)
