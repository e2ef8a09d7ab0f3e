"""What the inventory must show: everything there, equal on all nodes, healthy, and nobody else's."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tasks.cluster.evidence import Evidence
from tasks.contracts.cluster_report import Finding, Layer, RankRecord, Status

EQUAL = ("python", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "cuda", "nccl", "kernel",
         "num_processors", "num_threads", "governor", "processor")  # fmt: skip
"""Facts that all processes must share."""
EQUAL_GPU = ("name", "driver", "power_limit_watts", "max_sm_clock_mhz", "persistence", "ecc", "pcie_generation",
             "pcie_width", "nvlinks")  # fmt: skip
"""The same of all GPUs."""


def inventory_findings(evidence: Evidence) -> list[Finding]:
    """The inventory's gates; none where it did not run."""
    outcome = evidence.outcomes.get("inventory")
    records = evidence.records.get("inventory", ())
    if outcome is None or not records:
        return []
    findings = [_equal(evidence, records, name) for name in EQUAL]
    findings.append(_clocks(evidence, records))
    if evidence.check.pool.gpus:
        findings += _gpus(evidence, records)
        findings += _links(evidence, records)
        findings.append(_topology(evidence, records))
    return findings


def _finding(
    gate: str, layer: Layer, bad: Mapping[str, str], good: str, action: str, status: Status = Status.FAIL
) -> Finding:
    """A finding from what is wrong by place; nothing wrong is a pass."""
    shown = "; ".join(f"{place}: {what}" for place, what in list(bad.items())[:8])
    return Finding(
        stage="inventory", gate=gate, status=status if bad else Status.PASS, layer=layer, culprits=tuple(bad),
        detail=shown if bad else good, action=action if bad else "",
    )  # fmt: skip


def _equal(evidence: Evidence, records: Sequence[RankRecord], name: str) -> Finding:
    is_count = name in ("num_processors", "num_threads")
    # The node is what has a version; a process only shows it, and each may show another.
    told: dict[str, list[Any]] = defaultdict(list)
    for record in records:
        told[evidence.place(record) if is_count else evidence.node_of(record)].append(record.facts.get(name))
    values = {place: seen[0] if len(set(map(str, seen))) == 1 else _several(seen) for place, seen in told.items()}
    action = (
        "look at its CPU affinity, cgroup and OMP_NUM_THREADS" if is_count else f"make {name} the same on all nodes"
    )
    numbers = [value for value in values.values() if isinstance(value, int)]
    # Of two halves, the one with fewer is the one that lacks something; a version is held against the submitting process's.
    usual = max(numbers) if is_count and numbers else evidence.own_versions.get(name)
    bad = minority(values, usual)
    return _finding(f"equal_{name}", "equality", bad, f"{next(iter(values.values()))} on all", action)


def _several(seen: Sequence[Any]) -> str:
    """What the processes of one node say that do not agree."""
    return " and ".join(sorted({"not told" if value is None else str(value) for value in seen}))


def minority(values: Mapping[str, Any], in_doubt: Any = None) -> dict[str, str]:
    """Who differs from what most have.

    Args:
        in_doubt: which value is right where two are equally common; without it all are named: any of them may be wrong.
    """
    absent = {place: "not told" for place, value in values.items() if value is None}
    known = {place: str(value) for place, value in values.items() if value is not None}
    if len(set(known.values())) < 2:
        return absent
    (first, most), (_, second), *_ = Counter(known.values()).most_common(2)
    if most == second:
        if str(in_doubt) not in known.values():
            return absent | known
        first = str(in_doubt)
    return absent | {place: f"{value}, the others {first}" for place, value in known.items() if value != first}


def _clocks(evidence: Evidence, records: Sequence[RankRecord]) -> Finding:
    limit, bad = evidence.check.thresholds.max_clock_skew_s, {}
    ahead: dict[str, float] = {}
    for record in records:
        seconds = next((f.value for f in record.figures if f.name == "clock_ahead_s"), None)
        if seconds is None or not math.isfinite(seconds):
            bad[evidence.node_of(record)] = "its clock was not read"
        else:
            ahead.setdefault(evidence.node_of(record), seconds)
    # They are told against rank 0's clock, which may itself be the wrong one: most of the clocks are held for right.
    usual = statistics.median(ahead.values()) if ahead else 0.0
    worst = max(ahead.values(), default=0.0) - min(ahead.values(), default=0.0)
    if len(ahead) == 2 and worst > limit:
        bad |= dict.fromkeys(ahead, f"{worst:.1f} s between the two clocks (limit {limit:g})")
    elif len(ahead) > 2:
        worst = max(abs(seconds - usual) for seconds in ahead.values())
        bad |= {
            node: f"{seconds - usual:+.1f} s against the others' clocks (limit {limit:g})"
            for node, seconds in ahead.items()
            if abs(seconds - usual) > limit
        }
    return _finding(
        "clock_skew",
        "limit",
        bad,
        f"within {worst * 1e3:.1f} ms",
        "start chrony or ntpd on it; compare with a time server",
    ).model_copy(update={"value": worst, "limit": limit})


def _gpus_of(evidence: Evidence, records: Sequence[RankRecord]) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
    """GPUs by place, and what is wrong with how many a node shows."""
    width = evidence.check.pool.processes_per_node
    found: dict[str, Mapping[str, Any]] = {}
    bad: dict[str, str] = {}
    for record in records:
        if record.process != 0:
            continue
        node, gpus = evidence.node_of(record), record.facts.get("gpus")
        if not isinstance(gpus, list) or any(not isinstance(gpu, dict) for gpu in gpus):
            bad[node] = "what its driver says of GPUs cannot be understood"
            continue
        # A job may ask for fewer than the node has.
        if len(gpus) < width:
            why = record.facts.get("nvml_error")
            bad[node] = f"{len(gpus)} GPUs instead of {width}" + (f" ({why})" if why else "")
        found |= {f"{node}/gpu{number}": gpu for number, gpu in enumerate(gpus)}
    return found, bad


def _gpus(evidence: Evidence, records: Sequence[RankRecord]) -> list[Finding]:
    gpus, wrong_count = _gpus_of(evidence, records)
    findings = [
        _finding(
            "num_gpus",
            "presence",
            wrong_count,
            "all there",
            "see lspci and dmesg (XID 79: fell off the bus); drain the node",
        )
    ]
    for name in EQUAL_GPU:
        bad = minority({place: gpu.get(name) for place, gpu in gpus.items()})
        findings.append(
            _finding(f"equal_gpu_{name}", "equality", bad, "the same on all GPUs", f"make {name} the same on all GPUs")
        )

    def each(
        gate: str, is_bad: Callable[[Mapping[str, Any]], str | None], action: str, status: Status = Status.FAIL
    ) -> None:
        bad = {place: what for place, gpu in gpus.items() if (what := is_bad(gpu))}
        findings.append(_finding(gate, "limit", bad, "none", action, status))

    def more_than_none(name: str, what: str) -> Callable[[Mapping[str, Any]], str | None]:
        def look(gpu: Mapping[str, Any]) -> str | None:
            value = gpu.get(name)
            return f"{name} was not told" if value is None else f"{value} {what}" if value else None

        return look

    each("gpu_ecc_uncorrected", more_than_none("ecc_uncorrected", "uncorrected memory errors since the driver started"),
         "reset the GPU; replace it if they come again")  # fmt: skip
    each("gpu_remap_failed", more_than_none("remap_failed", "rows could not be remapped"), "replace the GPU")
    each(
        "gpu_remap_pending",
        more_than_none("remap_pending", "rows wait for a reset"),
        "drain the node and reset the GPU",
    )
    each("gpu_pcie_width",
         lambda gpu: None if gpu.get("pcie_width") == gpu.get("max_pcie_width") is not None
         else f"x{gpu.get('pcie_width')} of x{gpu.get('max_pcie_width')}",
         "reseat the GPU or its riser")  # fmt: skip
    each("gpu_nvlinks_up",
         lambda gpu: None if gpu.get("nvlinks") in (0, None) or gpu.get("nvlinks_up") == gpu.get("nvlinks")
         else f"{gpu.get('nvlinks_up')} of {gpu.get('nvlinks')} NVLinks are up",
         "see nvidia-smi nvlink -s and the fabric manager's log")  # fmt: skip
    each("gpu_busy",
         lambda gpu: "who uses it was not told" if gpu.get("busy_processes") is None
         else f"processes {gpu['busy_processes']} of others" if gpu["busy_processes"] else None,
         "wait for them or end them: figures of a shared GPU say nothing of it", Status.ERROR)  # fmt: skip
    xids: dict[str, str] = {}
    for record in records:
        seen = record.facts.get("xids")
        if record.process == 0 and seen != []:
            xids[evidence.node_of(record)] = str(seen[-1]) if isinstance(seen, list) else str(seen or "not told")
    findings.append(
        _finding(
            "xid", "limit", xids, "none in the kernel's log", "look the number up in NVIDIA's XID table", Status.WARN
        )
    )
    return findings


def _links(evidence: Evidence, records: Sequence[RankRecord]) -> list[Finding]:
    """InfiniBand and RoCE ports: all up, as many and as fast as on the other nodes."""
    by_node = {
        evidence.node_of(r): r.facts.get("infiniband") for r in records if r.process == 0
    }  # fmt: skip
    down: dict[str, str] = {}
    rates: dict[str, Any] = defaultdict(str)
    # A port that nobody has connected is no fault; one that works on another node, or of which none works, is.
    active = {
        (port.get("device"), port.get("port"))
        for ports in by_node.values()
        for port in dicts_of(ports)
        if port.get("state") == "ACTIVE"
    }
    for node, ports in by_node.items():
        if not isinstance(ports, list) or any(not isinstance(port, dict) for port in ports):
            down[node] = "its ports were not told"
            continue
        for port in ports:
            is_wanted = not active or (port.get("device"), port.get("port")) in active
            if port.get("state") != "ACTIVE" and is_wanted:
                down[f"{node}/{port.get('device')}"] = f"port {port.get('port')} is {port.get('state') or 'not told'}"
        rates[node] = sorted(str(port.get("rate_gbits_per_s")) for port in ports)
    return [
        _finding("link_state", "limit", down, "all ports are up", "see ibstat; check cable and switch port"),
        _finding(
            "equal_links",
            "equality",
            minority(rates),
            "as many and as fast on all nodes",
            "see ibstat on both; reseat or replace",
        ),
    ]


def _topology(evidence: Evidence, records: Sequence[RankRecord]) -> Finding:
    """On all nodes the same GPUs and adapters near to each other, whichever of them this job was given."""
    told = {evidence.node_of(r): _nearness(r.facts.get("topology")) for r in records if r.process == 0}
    if not any(told.values()):
        return Finding(
            stage="inventory", gate="equal_topology", status=Status.SKIP, layer="presence",
            detail="no node shows GPUs in its tree of devices (/sys/bus/pci/devices)",
        )  # fmt: skip
    return _finding(
        "equal_topology", "equality", minority(told), str(next(iter(told.values()))),
        "compare nvidia-smi topo -m on both: a card in another slot, a firmware setting, or a virtual machine's own order",
        Status.WARN,
    )  # fmt: skip


def _nearness(gpus: Any) -> str | None:
    """A node's GPUs by what is how near to each, in words; None: not told of one."""
    if not isinstance(gpus, list) or not gpus or len(dicts_of(gpus)) < len(gpus):
        return None
    alike = Counter(f"adapters {_counted(gpu.get('adapters'))}; GPUs {_counted(gpu.get('gpus'))}" for gpu in gpus)
    return ", ".join(
        f"{count} x ({near})" for near, count in sorted(alike.items(), key=lambda item: (-item[1], item[0]))
    )


def _counted(levels: Any) -> str:
    if not isinstance(levels, dict):
        return "not told"
    return " ".join(f"{count} {level}" for level, count in sorted(levels.items())) or "none"


def dicts_of(values: Any) -> list[Mapping[str, Any]]:
    """Those of what a record tells that can be read; what cannot is a finding elsewhere."""
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def busy_or_missing(findings: Sequence[Finding]) -> str | None:
    """Why nothing that follows the inventory can mean anything; None: it can."""
    for finding in findings:
        if finding.gate == "num_gpus" and finding.status is Status.FAIL:
            return f"GPUs are missing ({finding.detail})"
        if finding.gate == "gpu_busy" and finding.status is Status.ERROR:
            return f"GPUs are used by others ({finding.detail})"
    return None
