"""A report from evidence, and its plain forms: terminal, Markdown, JUnit XML, Prometheus' text format."""

import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from tasks.cluster.evidence import Evidence, history_key
from tasks.cluster.figure_gates import NOTHING_TO_HOLD_IT_AGAINST
from tasks.cluster.judge import judge, references_of, statement_of, status_of, suspects_of
from tasks.cluster.reaction import told
from tasks.contracts.cluster_report import Finding, NodeFacts, Report, Status
from tasks.contracts.files import digest_of
from tasks.contracts.prometheus_text import Sample, render

MAX_REACTION_CHARACTERS = 5000
MEANINGS = {
    "cluster_check_status": "Whether the cluster's newest check gave this verdict.",
    "cluster_check_finished_seconds": "When that check ended, unix time.",
    "cluster_check_gates": "Its gates by verdict.",
    "cluster_check_figure": "Its figures, each in the unit that its name ends with.",
}
"""Of what Prometheus is told."""
GOOD = (Status.PASS, Status.WARN)
FINGERPRINT = ("torch", "cuda", "nccl", "kernel", "processor", "num_processors", "num_threads")


def build_report(evidence: Evidence, run: str, started: float, seconds: float) -> Report:
    """The whole report.

    Args:
        started: unix time in s.
    """
    check = evidence.check
    findings = judge(evidence)
    references, unknown = references_of(evidence)
    status, suspects = status_of(findings), suspects_of(findings)
    return Report(
        run=run,
        cluster=check.cluster,
        started=datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        seconds=seconds,
        status=status,
        statement=statement_of(status, findings, suspects),
        injected=None if check.inject is None else str(check.inject.model_dump(mode="json")),
        chip=references.chip.name if references.chip else "unknown",
        node_fabric=references.node_fabric.name if references.node_fabric else "unknown",
        cluster_fabric=references.cluster_fabric.name if references.cluster_fabric else "unknown",
        fingerprint=fingerprint(evidence),
        num_history=evidence.num_history,
        nodes=tuple(_nodes(evidence)),
        stages=tuple(evidence.outcomes.values()),
        findings=tuple(findings),
        suspects=tuple(suspects),
        figures=tuple(evidence.placed()),
        notes=(*unknown, *evidence.notes, *_unjudged(findings)),
    )


def _unjudged(findings: Sequence[Finding]) -> list[str]:
    """What passes because it was measured, and for no better reason: nobody shall take it for found good."""
    names = sorted({f.gate for f in findings if f.status is Status.PASS and f.detail == NOTHING_TO_HOLD_IT_AGAINST})
    if not names:
        return []
    return [f"measured, with no floor, fleet or history to be held against so far: {', '.join(names)}"]


def fingerprint(evidence: Evidence) -> str:
    """Of hardware and software: figures of runs with another one are not compared."""
    facts = [
        {name: record.facts.get(name) for name in FINGERPRINT}
        | {"gpus": [(g.get("name"), g.get("driver")) for g in record.facts.get("gpus") or [] if isinstance(g, dict)]}
        for record in evidence.records.get("inventory", ())
    ]
    pool = evidence.check.pool
    probes = evidence.check.model_dump(mode="json", include={"devices", "collectives", "storage_probe", "training"})
    return digest_of([facts, pool.num_nodes, pool.processes_per_node, pool.backend, probes])[:12]


def _nodes(evidence: Evidence) -> list[NodeFacts]:
    found: dict[int, NodeFacts] = {}
    for record in evidence.records.get("inventory", ()):
        if record.process == 0:
            gpus = [gpu for gpu in record.facts.get("gpus") or [] if isinstance(gpu, dict)]
            names = tuple(str(gpu.get("name")) for gpu in gpus) or (str(record.facts.get("processor")),)
            facts = {k: v for k, v in record.facts.items() if k not in ("gpus", "infiniband", "xids")}
            found[record.node] = NodeFacts(
                name=evidence.node_of(record), host=record.host, devices=names, facts=facts
            )  # fmt: skip
    return [found[node] for node in sorted(found)]


def metrics_of(report: Report) -> dict[str, float]:
    """Every figure under the name of its history; what is no number is left out, its finding says so."""
    return {
        history_key(placed): placed.figure.value
        for placed in report.figures
        if placed.figure.value is not None and placed.figure.value == placed.figure.value
    }


def size_text(size_bytes: int | None) -> str:
    """A size for people, ``64 KiB``."""
    if size_bytes is None:
        return ""
    value, units = float(size_bytes), ["B", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:g} {units[0]}" if value == int(value) else f"{value:.3g} {units[0]}"


def not_passed(report: Report) -> tuple[list[Finding], dict[str, int]]:
    """What does not pass, and how many more gates of each stage were not measured because the stage ended before them.

    Those are all FAIL, and say nothing that the stage's own finding does not.
    """
    told: list[Finding] = []
    unmeasured: dict[str, int] = {}
    ended = {outcome.stage for outcome in report.stages if outcome.state == "failed"}
    for finding in report.findings:
        if finding.status not in (Status.FAIL, Status.ERROR, Status.WARN):
            continue
        is_missing = finding.layer == "presence" and finding.gate != "finished" and not finding.culprits
        if finding.stage in ended and is_missing:
            unmeasured[finding.stage] = unmeasured.get(finding.stage, 0) + 1
        else:
            told.append(finding)
    return told, unmeasured


def terminal(report: Report) -> str:
    """What a person can act on: what is wrong first, then one line a stage and its key figures, then the verdict."""
    lines = [""]
    told, unmeasured = not_passed(report)
    for finding in told:
        size = f" at {size_text(finding.size_bytes)}" if finding.size_bytes is not None else ""
        lines.append(f"{finding.status.value:<6}{finding.stage}/{finding.gate}{size}: {_short(finding.detail, 300)}")
        if finding.culprits:
            others = " and others" if len(finding.culprits) > 6 else ""
            lines.append(f"      who   {', '.join(finding.culprits[:6])}{others}")
        if finding.action:
            lines.append(f"      do    {finding.action}")
    for stage, count in unmeasured.items():
        lines.append(f"FAIL  {stage}: {count} more gates were not measured, because the stage ended before them")
    if len(lines) > 1:
        lines.append("")
    lines.append(f"{'stage':<14}{'seconds':>8}  {'gates':<34}key figures")
    for outcome in report.stages:
        own = [f for f in report.findings if f.stage == outcome.stage]
        counts = ", ".join(f"{n} {s.value}" for s in Status if (n := sum(f.status is s for f in own)))
        seconds = f"{outcome.seconds:>8.1f}" if outcome.state in ("done", "failed") else f"{outcome.state:>8}"
        lines.append(f"{outcome.stage:<14}{seconds}  {counts:<34}{_key_figures(report, outcome.stage)}")
    for note in report.notes:
        lines.append(f"note: {note}")
    if report.injected:
        lines.append(f"note: this check did a fault to itself: {report.injected}")
    if report.suspects:
        lines.append("")
        lines += [
            f"suspect {number}: {suspect.place} ({len(suspect.gates)} gates). {_sentence(suspect.action)}"
            for number, suspect in enumerate(report.suspects[:5], 1)
        ]
    if reacted := reaction_lines(report):
        lines += ["", *reacted]
    return "\n".join([*lines, "", report.statement])


def reaction_lines(report: Report) -> list[str]:
    """What was done to the nodes that are accused, or would be, and what was left alone; empty where nothing was asked for."""
    if report.reaction is None:
        return []
    mode = "a dry run: nothing was done" if report.reaction.mode == "dry_run" else report.reaction.mode
    lines = [f"reaction ({mode}): {told(action)} (by {action.undone_by})" for action in report.reaction.actions]
    lines += [f"reaction ({mode}): left alone: {why}" for why in report.reaction.left_alone]
    return lines or [f"reaction ({mode}): no node is accused"]


def _key_figures(report: Report, stage: str) -> str:
    shown = {
        "devices": (
            "matrix_product_bfloat16_tflops_per_s",
            "matrix_product_float32_tflops_per_s",
            "memory_copy_gbytes_per_s",
        ),
        "storage": ("shared_write_gbytes_per_s", "shared_read_gbytes_per_s"),
        "training": ("training_tokens_per_s_per_gpu", "training_scaling_efficiency"),
    }.get(stage, ())
    parts = []
    for name in shown:
        values = [p.figure.value for p in report.figures if p.figure.name == name and p.figure.value is not None]
        if values:
            span = f"{min(values):.4g}" if len(values) == 1 else f"{min(values):.4g} to {max(values):.4g}"
            parts.append(_told(name, span))
    if stage == "collectives":
        curve = [
            p.figure for p in report.figures if p.figure.name == "all_reduce_busbw_gbytes_per_s" and p.figure.value
        ]
        parts += [f"all-reduce {f.value:.3g} GB/s at {size_text(f.size_bytes)}" for f in curve[-1:]]
    if stage == "inventory" and report.nodes:
        # One node has nothing between nodes.
        fabric = report.cluster_fabric if len(report.nodes) > 1 else report.node_fabric
        parts.append(f"{len(report.nodes)} nodes, {report.nodes[0].devices[0]}, {fabric}")
    return "; ".join(parts)


def _told(name: str, value: str) -> str:
    """A figure for people: ``memory copy 7.7 GB/s``."""
    units = {
        "_tflops_per_s": " TFLOP/s",
        "_gbytes_per_s": " GB/s",
        "_tokens_per_s_per_gpu": " tokens/s/rank",
        "_ms": " ms",
    }
    for ending, unit in units.items():
        if name.endswith(ending):
            return f"{name.removesuffix(ending).replace('_', ' ')} {value}{unit}"
    return f"{name.replace('_', ' ')} {value}"


def markdown(report: Report) -> str:
    """The report for Prefect's artifact, verdict first."""
    lines = [f"# {report.status.value}: {report.cluster}", "", report.statement, ""]
    bad, unmeasured = not_passed(report)
    if bad:
        lines += ["| verdict | gate | size | who | what | do |", "|---|---|---|---|---|---|"]
        lines += [
            f"| **{f.status.value}** | {f.stage}/{f.gate} | {size_text(f.size_bytes)} | {_cell(', '.join(f.culprits[:4]))} "
            f"| {_cell(f.detail)} | {_cell(f.action)} |"
            for f in bad[:50]
        ]
        lines += ["", *(f"{count} more gates of {stage} were not measured." for stage, count in unmeasured.items()), ""]
    lines += [
        "| stage | state | seconds | PASS | WARN | FAIL | ERROR | SKIP |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for outcome in report.stages:
        counts = [sum(f.stage == outcome.stage and f.status is s for f in report.findings) for s in Status]
        lines.append(
            f"| {outcome.stage} | {outcome.state} | {outcome.seconds:.1f} | " + " | ".join(map(str, counts)) + " |"
        )
    lines += ["", *(f"- {_cell(note)}" for note in report.notes)]
    # Whole: a command that is cut does something else.
    lines += [f"- {_cell(line, MAX_REACTION_CHARACTERS)}" for line in reaction_lines(report)]
    return "\n".join(lines)


def junit(report: Report) -> str:
    """JUnit XML: a suite a stage, a case a gate; WARN passes and is told in the output, SKIP is skipped."""
    root = ET.Element("testsuites", name=f"cluster-check {report.cluster}", time=f"{report.seconds:.3f}")
    for outcome in report.stages:
        own = [f for f in report.findings if f.stage == outcome.stage]
        suite = ET.SubElement(
            root, "testsuite", name=outcome.stage, tests=str(len(own)), time=f"{outcome.seconds:.3f}", timestamp=report.started,
            failures=_count(own, Status.FAIL), errors=_count(own, Status.ERROR), skipped=_count(own, Status.SKIP),
        )  # fmt: skip
        for finding in own:
            name = finding.gate + (f" at {size_text(finding.size_bytes)}" if finding.size_bytes is not None else "")
            case = ET.SubElement(suite, "testcase", classname=f"cluster-check.{outcome.stage}", name=name, time="0")
            text = f"{finding.detail}\nwho: {', '.join(finding.culprits) or '-'}\ndo: {finding.action or '-'}"
            kind = {Status.FAIL: "failure", Status.ERROR: "error", Status.SKIP: "skipped"}.get(finding.status)
            if kind:
                ET.SubElement(case, kind, message=_xml(finding.detail), type=finding.layer).text = _xml(text)
            else:
                ET.SubElement(case, "system-out").text = _xml(f"{finding.status.value}: {text}")
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def prometheus(report: Report) -> str:
    """Prometheus' text format, for node_exporter's textfile collector."""
    return render(samples_of(report), MEANINGS)


def samples_of(report: Report) -> list[Sample]:
    """What Prometheus is told of a check; a figure without a number is NaN."""
    cluster = {"cluster": report.cluster}
    finished = datetime.fromisoformat(report.started).timestamp() + report.seconds
    found: list[Sample] = [("cluster_check_finished_seconds", cluster, round(finished))]
    for status in Status:
        labels = cluster | {"verdict": status.value}
        found.append(("cluster_check_status", labels, report.status is status))
        found.append(("cluster_check_gates", labels, sum(finding.status is status for finding in report.findings)))
    # A node's figures are told by each of its processes, and one series may stand there once.
    series: dict[tuple[str, ...], Sample] = {}
    for placed in report.figures:
        figure = placed.figure
        labels = cluster | {"stage": placed.stage, "figure": figure.name, "place": placed.place}
        labels |= {"size_bytes": str(figure.size_bytes)} if figure.size_bytes is not None else {}
        labels |= {"peer": figure.peer} if figure.peer is not None else {}
        value = math.nan if figure.value is None else figure.value
        series.setdefault(
            tuple(f"{key}={text}" for key, text in labels.items()), ("cluster_check_figure", labels, value)
        )
    return [*found, *series.values()]


def _count(findings: Sequence[Finding], status: Status) -> str:
    return str(sum(finding.status is status for finding in findings))


def _short(text: str, limit: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "." if text else ""


def _cell(text: Any, limit: int = 300) -> str:
    return _short(str(text).replace("|", "\\|").replace("`", "'"), limit)


def _xml(text: str) -> str:
    """Without the control characters that XML has no place for."""
    return "".join(c for c in text if c in "\t\n\r" or c >= " ")
