"""What came up while the devices were under load for minutes: errors that the inventory did not have yet, and a lowered link."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tasks.cluster.evidence import Evidence
from tasks.cluster.inventory_gates import dicts_of
from tasks.contracts.cluster_report import Finding, RankRecord, Status

ERRORS = ("ecc_uncorrected", "remapped_uncorrected", "remap_pending", "remap_failed")
"""Counts and signs of the driver's that must be what they were before the load."""
NO_RECORD = "its GPUs were not read again after the load"


def endurance_findings(evidence: Evidence) -> list[Finding]:
    """The gates of what is read again on GPUs; none where the stage did not end, which has a finding of its own."""
    outcome = evidence.outcomes.get("endurance")
    if outcome is None or outcome.state != "done" or not evidence.check.pool.gpus:
        return []
    before = _by_node(evidence, "inventory")
    after = _by_node(evidence, "endurance")
    errors: dict[str, str] = {}
    links: dict[str, str] = {}
    news: dict[str, str] = {}
    unread: dict[str, str] = {}
    # A scheduler may have given this job another node (same_nodes tells): nothing is known of it, and it is to blame for nothing.
    new_here = dict.fromkeys(sorted(after.keys() - before.keys()), "is not in the inventory")
    for node in sorted(after.keys() & before.keys()):
        record, earlier = after[node], before[node].facts
        known = {gpu.get("uuid"): gpu for gpu in dicts_of(earlier.get("gpus"))}
        gpus = {gpu.get("uuid"): gpu for gpu in dicts_of(record.facts.get("gpus"))}
        if not known or not gpus:
            errors[node] = links[node] = NO_RECORD
        for number, uuid in enumerate(known if gpus else ()):
            place = f"{node}/gpu{number}"
            if uuid not in gpus:
                errors[place] = "is not seen any more"
                continue
            if what := _worse(known[uuid], gpus[uuid]):
                errors[place] = what
            if what := _lowered(gpus[uuid]):
                links[place] = what
        seen, seen_before = record.facts.get("xids"), earlier.get("xids")
        if not isinstance(seen, list) or not isinstance(seen_before, list):
            unread[node] = str(seen if isinstance(seen, str) else seen_before or "not told")
        # Lines have no times: one that comes again is told from the old one by their number alone.
        elif new := list((Counter(map(str, seen)) - Counter(map(str, seen_before))).elements()):
            news[node] = new[-1]
    drain = "drain the node, reset the GPU, replace it if it repeats"
    reseat = "reseat the GPU or its riser; see lspci -vv"
    return [
        _finding("gpu_errors_under_load", errors, new_here, "none came", drain),
        _finding("pcie_generation_under_load", links, new_here, "the highest on all", reseat),
        # What came while the check alone used the GPUs is no old story, as one in the inventory may be.
        _finding("xid_under_load", news, unread | new_here, "no new one in the kernel's log",
                 "look the number up in NVIDIA's XID table; drain the node"),
    ]  # fmt: skip


def _by_node(evidence: Evidence, stage: str) -> dict[str, RankRecord]:
    """The record of each node's first process, which tells of all its GPUs."""
    return {evidence.node_of(r): r for r in evidence.records.get(stage, ()) if r.process == 0}


def _worse(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """What the driver counts now and did not before; a count that is not told any more is no zero."""
    changed = [
        f"{name} {before.get(name)} -> {after.get(name)}" for name in ERRORS if after.get(name) != before.get(name)
    ]
    return ", ".join(changed) or None


def _lowered(gpu: Mapping[str, Any]) -> str | None:
    now, highest = gpu.get("pcie_generation"), gpu.get("max_pcie_generation")
    if now is None or highest is None:
        return "its PCIe generation was not told"
    return f"generation {now} of {highest} under load" if now < highest else None


def _finding(gate: str, bad: Mapping[str, str], unread: Mapping[str, str], good: str, action: str) -> Finding:
    shown = bad or unread
    return Finding(
        stage="endurance", gate=gate, status=Status.FAIL if bad else Status.WARN if unread else Status.PASS, layer="limit",
        culprits=tuple(shown), detail="; ".join(f"{place}: {what}" for place, what in list(shown.items())[:8]) or good,
        action=action if bad else "let jobs read /dev/kmsg, and all stages run on the same nodes" if unread else "",
    )  # fmt: skip
