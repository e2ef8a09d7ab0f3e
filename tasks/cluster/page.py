"""The report's page: verdict, suspects, gates, curves, pair matrix, devices, history, in one file without a network."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from tasks.cluster.report import not_passed, reaction_lines, size_text
from tasks.contracts.cluster_report import Finding, Report, Status
from tasks.hardware.reference import fabric_of
from tasks.pages.cluster_figures import bandwidth_by_size, pair_matrix, trend
from tasks.pages.page import render_page

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv")
DEVICE_FIGURES = {
    "matrix_product_bfloat16_tflops_per_s": "bf16, TFLOP/s",
    "matrix_product_float8_tflops_per_s": "fp8, TFLOP/s",
    "matrix_product_float32_tflops_per_s": "fp32, TFLOP/s",
    "memory_copy_gbytes_per_s": "memory copy, GB/s",
    "host_to_device_gbytes_per_s": "host to device, GB/s",
    "device_to_host_gbytes_per_s": "device to host, GB/s",
    "step_s": "training step, s",
    "sm_clock_mhz": "clock, MHz",
    "power_watts": "power, W",
    "temperature_celsius": "°C",
    "throttled_share": "throttled",
}
NODE_FACTS = ("torch", "cuda", "nccl", "kernel", "num_processors", "num_threads")
TRENDS = {
    "matrix_product": "slowest product, TFLOP/s",
    "all_reduce_busbw": "all-reduce, largest, GB/s",
    "training_tokens_per_s_per_gpu": "training, tokens/s/rank",
}
MAX_RUNS_SHOWN = 20


def page(report: Report, earlier: Sequence[Mapping[str, Any]]) -> str:
    """The page.

    Args:
        earlier: ``run``, ``at`` (unix time in s), ``verdict`` and ``metrics`` of earlier checks of this cluster, oldest first.
    """
    used = [name for name in DEVICE_FIGURES if any(p.figure.name == name for p in report.figures)]
    bad, unmeasured = not_passed(report)
    fabric = fabric_of(report.cluster_fabric) or fabric_of(report.node_fabric)
    return render_page(
        "cluster_check.html",
        report=report,
        fabric=fabric.title if fabric else "fabric not known",
        source=fabric.source if fabric else "",
        started=datetime.fromisoformat(report.started).strftime("%Y-%m-%d %H:%M UTC"),
        headline=_headline(report),
        bad=sorted(bad, key=lambda f: (f.status is Status.WARN, f.layer == "presence", f.stage)),
        unmeasured=unmeasured,
        reaction=reaction_lines(report),
        curves=_markup(_curves(report)),
        matrix=_markup(_matrix(report)),
        statuses=[s.value for s in Status],
        stages=[(outcome, _counts(report, outcome.stage)) for outcome in report.stages],
        device_columns=[DEVICE_FIGURES[name] for name in used],
        devices=_devices(report, used, bad),
        node_columns=NODE_FACTS,
        trends=[Markup(svg) for svg in _trends(report, earlier)],  # noqa: S704 - drawn by us
        runs=[
            {**entry, "at": datetime.fromtimestamp(entry["at"], UTC).strftime("%Y-%m-%d %H:%M")}
            for entry in list(reversed(earlier))[:MAX_RUNS_SHOWN]
        ],
        filters={"size": size_text},
    )


def _markup(svg: str) -> Markup | None:
    return Markup(svg) if svg else None  # noqa: S704 - drawn by us


def _counts(report: Report, stage: str) -> dict[str, int]:
    return {s.value: sum(f.stage == stage and f.status is s for f in report.findings) for s in Status}


def _headline(report: Report) -> list[tuple[str, str, str]]:
    found = [("gates passed", str(sum(f.status is Status.PASS for f in report.findings)), "")]
    found.append(("not passed", str(sum(f.status in (Status.FAIL, Status.ERROR) for f in report.findings)), ""))
    curve = [p.figure for p in report.figures if p.figure.name == "all_reduce_busbw_gbytes_per_s" and p.figure.value]
    if curve:
        top = max(curve, key=lambda f: f.size_bytes or 0)
        found.append((f"all-reduce at {size_text(top.size_bytes)}", f"{top.value:.3g}", "GB/s"))
    for name, title, unit in (
        ("training_tokens_per_s_per_gpu", "training", "tokens/s/rank"),
        ("training_scaling_efficiency", "scaling efficiency", ""),
    ):
        value = next((p.figure.value for p in report.figures if p.figure.name == name), None)
        if value is not None:
            found.append((title, f"{value:.0%}" if not unit else f"{value:,.0f}", unit))
    return found


def _curves(report: Report) -> str:
    curves = {}
    for operation in OPERATIONS:
        points = sorted(
            (p.figure.size_bytes, p.figure.value)
            for p in report.figures
            if p.figure.name == f"{operation}_busbw_gbytes_per_s" and p.figure.size_bytes is not None and p.figure.value
            and p.figure.value > 0
        )  # fmt: skip
        if points:
            curves[operation.replace("_", "-")] = points
    if not curves:
        return ""
    sizes = sorted({size for points in curves.values() for size, _ in points})
    across = len(report.nodes) > 1
    fabric = fabric_of(report.cluster_fabric if across else report.node_fabric)
    at = sorted({*sizes, *(size for size, _ in fabric.curve if size <= sizes[-1])}) if fabric else []
    ranks = sum(len(node.devices) for node in report.nodes)
    reference = [
        (s, v) for s in at if fabric is not None and (v := fabric.all_reduce_gbytes_per_s(s, ranks)) is not None
    ]
    floor = [
        (f.size_bytes, f.limit)
        for f in report.findings
        if f.gate == "all_reduce_busbw_gbytes_per_s" and f.size_bytes is not None and f.limit
    ]
    return bandwidth_by_size(curves, reference, sorted(floor), fabric.title if fabric else "")


def _matrix(report: Report) -> str:
    speeds = {
        (p.place, p.figure.peer): p.figure.value
        for p in report.figures
        if p.figure.name == "pair_gbytes_per_s" and p.figure.peer is not None and p.figure.value is not None
    }
    places = sorted({place for route in speeds for place in route})
    return pair_matrix(places, speeds) if speeds else ""


def _devices(
    report: Report, names: Sequence[str], bad: Sequence[Finding]
) -> list[tuple[str, list[tuple[float | None, bool]]]]:
    values: dict[str, dict[str, float | None]] = {}
    for placed in report.figures:
        if placed.stage == "devices" and placed.figure.name in names:
            values.setdefault(placed.place, {})[placed.figure.name] = placed.figure.value
    off = {(f.gate, culprit) for f in bad for culprit in f.culprits}
    return [
        (place, [(own.get(name), (name, place) in off) for name in names]) for place, own in sorted(values.items())
    ]  # fmt: skip


def _trends(report: Report, earlier: Sequence[Mapping[str, Any]]) -> list[str]:
    figures = []
    now = {}
    for placed in report.figures:
        if placed.figure.value is not None and placed.figure.value == placed.figure.value:
            key = f"{placed.stage}/{placed.figure.name}/{placed.figure.size_bytes}/{placed.place}"
            now[key.replace("/None", "")] = placed.figure.value
    for name, label in TRENDS.items():
        keys = [
            key for key in now if key.split("/")[1].startswith(name) and not key.split("/")[1].endswith("efficiency")
        ]
        if not keys:
            continue
        # The largest message, or the slowest of all places.
        key = max(keys, key=lambda k: int(k.split("/")[2]) if k.split("/")[2].isdigit() else 0)
        if name == "matrix_product":
            # Of the precision that training uses; processors have one alone.
            ours = [k for k in keys if "bfloat16" in k] or keys
            key = min(ours, key=lambda k: now[k])
        values = [entry["metrics"][key] for entry in earlier if key in entry["metrics"]] + [now[key]]
        if len(values) > 1:
            figures.append(trend(values[-MAX_RUNS_SHOWN:], label))
    return figures
