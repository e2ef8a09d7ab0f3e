"""Every form of a report says the same, and is what its readers take."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import jsonschema
import pytest

from tasks.cluster.page import page
from tasks.cluster.report import build_report, fingerprint, junit, markdown, metrics_of, prometheus, terminal
from tasks.contracts.cluster_report import Problem, Report, Status
from tests.cluster.clusters import Cluster

SCHEMA = Path(__file__).parents[2] / "docs" / "cluster-check.schema.json"
SAMPLE = re.compile(r'^[a-z_]+\{[a-z_]+="(?:[^"\\\n]|\\.)*"(?:,[a-z_]+="(?:[^"\\\n]|\\.)*")*\} (?:NaN|-?[0-9.e+-]+)$')


@pytest.fixture(scope="module")
def report() -> Report:
    cluster = Cluster()
    cluster.figure("devices", "memory_copy_gbytes_per_s", float("nan"), 11)
    hostile = Problem(gate="all_reduce_correct", error='<b>"wrong" | `sum`\x07</b>')
    cluster.change("collectives", lambda r: r.model_copy(update={"problems": (hostile,)}), 3)
    return build_report(cluster.evidence, "acceptance-1", 1.79e9, 300.0)


def test_the_published_schema_is_that_of_the_reports_that_are_written(report):
    schema = Report.model_json_schema(mode="serialization")
    assert json.loads(SCHEMA.read_text()) == schema, (
        "renew it: python -m tests.cluster.write_schema > docs/cluster-check.schema.json"
    )
    written = json.loads(report.model_dump_json())
    jsonschema.validate(written, schema)
    assert "NaN" not in json.dumps(written)
    assert Report.model_validate(written).status is Status.FAIL


def test_junit_has_a_case_for_every_gate_and_a_failure_for_every_fail(report):
    root = ET.fromstring(junit(report))
    assert len(root.findall(".//testcase")) == len(report.findings)
    assert len(root.findall(".//failure")) == sum(f.status is Status.FAIL for f in report.findings) == 2
    assert sum(int(suite.get("failures")) for suite in root) == 2
    assert "who: host-1/gpu3" in root.find(".//failure").text


def test_prometheus_text_is_well_formed(report):
    lines = prometheus(report).splitlines()
    assert all(line.startswith("# ") or SAMPLE.match(line) for line in lines), next(
        line for line in lines if not line.startswith("# ") and not SAMPLE.match(line)
    )
    # A node's clock and memory are told by each of its processes; Prometheus refuses a file with a series twice.
    series = [line.rpartition(" ")[0] for line in lines if not line.startswith("#")]
    assert len(series) == len(set(series))
    assert any("clock_ahead_s" in line for line in series)
    assert 'proving_ground_cluster_check_status{cluster="cluster",verdict="FAIL"} 1.0' in lines
    assert 'proving_ground_cluster_check_status{cluster="cluster",verdict="PASS"} 0.0' in lines


def test_what_a_person_reads_names_the_culprits_and_what_to_do(report):
    for text in (terminal(report), markdown(report), page(report, [])):
        assert "host-1/gpu3" in text
        assert "host-0/gpu3" in text
        assert "take this GPU out of use" in text
    assert terminal(report).splitlines()[-1].startswith("FAIL: 2 FAIL")


def test_the_page_stands_alone_and_takes_no_markup_from_what_was_measured(report):
    html = page(report, [])
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    assert "<b>&#34;wrong" not in html
    assert "&lt;b&gt;" in html


def test_history_is_kept_by_hardware_and_software_and_by_what_was_measured():
    cluster = Cluster()
    before = fingerprint(cluster.evidence)
    assert fingerprint(Cluster().evidence) == before
    cluster.fact("inventory", "nccl", "2.29.1")
    assert fingerprint(cluster.evidence) != before
    assert fingerprint(Cluster(devices={"matrix_size": 4096}).evidence) != before


def test_a_figure_that_is_no_number_is_no_metric(report):
    metrics = metrics_of(report)
    assert "devices/memory_copy_gbytes_per_s/host-1/gpu3" not in metrics
    assert metrics["devices/memory_copy_gbytes_per_s/host-1/gpu2"] == 2900.0


def test_an_injected_fault_is_told_wherever_the_verdict_is():
    cluster = Cluster(inject={"kind": "sleep", "node": 1})
    report = build_report(cluster.evidence, "proof", 1.79e9, 1.0)
    assert "did a fault to itself" in terminal(report)
    assert "did a fault to itself" in page(report, [])
