"""Errors that the ports of InfiniBand and RoCE adapters counted while the collectives ran between nodes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from tasks.cluster.evidence import Evidence
from tasks.cluster.inventory_gates import dicts_of
from tasks.cluster.transport import adapters_of
from tasks.contracts.cluster_report import Finding, RankRecord, Status
from tasks.hardware.infiniband import BROKEN, HIGHEST, NOISY

BEFORE, AFTER, WATCHED = "ports_before", "ports_after", "ports_watched_s"
"""Facts of each node's first process in the collectives: its ports at the beginning, at the end, and the seconds between."""
NOISE_PER_HOUR = 120
"""Single errors that a link may have: NVIDIA's NVSentinel calls more symbol errors an hour a fault."""
ACTIONS = {
    Status.FAIL: "see the switch's log of that port; reseat or replace the cable and its transceivers; drain the node",
    Status.WARN: "see whether it comes again; clean or reseat the cable, on RoCE look at flow control (PFC, ECN) on the way; "
    "set full counters back (perfquery -R)",
}


@dataclass
class _Seen:
    """What is wrong, by port, and how many nodes told of theirs."""

    broken: dict[str, str] = field(default_factory=dict)
    noisy: dict[str, str] = field(default_factory=dict)
    num_nodes: int = 0
    num_ports: int = 0


def port_findings(evidence: Evidence) -> list[Finding]:
    """One gate, of GPUs on several nodes with such ports; none where the stage did not end, which has a finding of its own.

    FAIL is a link of NCCL's own adapters that failed; of other adapters, whoever uses them, it is a WARN. So are single errors
    beyond :data:`NOISE_PER_HOUR`, and counters that stand at their end and can tell nothing.
    """
    outcome, pool = evidence.outcomes.get("collectives"), evidence.check.pool
    if outcome is None or outcome.state != "done" or pool.num_nodes < 2 or not pool.gpus:
        return []
    seen = _Seen()
    for record in evidence.records.get("collectives", ()):
        if record.process == 0:
            _look(seen, evidence.node_of(record), record)
    if not seen.num_ports:
        return []
    bad, status = seen.broken or seen.noisy, Status.PASS
    if bad:
        status = Status.FAIL if seen.broken else Status.WARN
    elif seen.num_nodes < pool.num_nodes:
        status = Status.SKIP
    good = (
        "no more than links may have"
        if status is Status.PASS
        else f"known of {seen.num_nodes} of {pool.num_nodes} nodes"
    )
    return [
        Finding(
            stage="collectives", gate="port_errors", status=status, layer="limit" if status is not Status.SKIP else "presence",
            culprits=tuple(bad), detail="; ".join(f"{where}: {what}" for where, what in list(bad.items())[:8]) or good,
            action=ACTIONS.get(status, ""),
        )
    ]  # fmt: skip


def _look(seen: _Seen, node: str, record: RankRecord) -> None:
    before, after, seconds = (record.facts.get(name) for name in (BEFORE, AFTER, WATCHED))
    seen.num_ports += max(len(dicts_of(before)), len(dicts_of(after)))
    if not (_are_ports(before) and _are_ports(after) and isinstance(seconds, int | float)):
        return
    adapters = adapters_of(record)
    now = {(port.get("device"), port.get("port")): port for port in after}
    active = [port for port in before if port.get("state") == "ACTIVE"]
    # Adapters of other makers have other counters, or none.
    seen.num_nodes += any(port.get(name) is not None for port in active for name in BROKEN + NOISY)
    for port in active:
        found = now.get((port.get("device"), port.get("port")))
        broken = _failed(port, found)
        noisy = _noisy(port, found or {}, seconds)
        where = f"{node}/{port.get('device')}" + ("" if port.get("port") == "1" else f":{port.get('port')}")
        if broken and port.get("device") in adapters:
            seen.broken[where] = broken
        elif broken or noisy:
            seen.noisy[where] = broken or noisy


def _are_ports(told: Any) -> TypeGuard[list[Mapping[str, Any]]]:
    return isinstance(told, list) and all(isinstance(port, dict) for port in told)


def _failed(before: Mapping[str, Any], after: Mapping[str, Any] | None) -> str:
    """Of a port that was up."""
    if after is None:
        return "is not there any more"
    if after.get("state") != "ACTIVE":
        return f"is {after.get('state') or 'not told'} now"
    return _told(before, after, {name: more for name in BROKEN if (more := _more(before, after, name))})


def _noisy(before: Mapping[str, Any], after: Mapping[str, Any], seconds: float) -> str:
    allowed = NOISE_PER_HOUR * seconds / 3600
    full = [f"{name} is at its end, {top}" for name, top in HIGHEST.items() if before.get(name) == top]
    grown = {name: more for name in NOISY if (more := _more(before, after, name)) > allowed}
    return "; ".join([*full, *([_told(before, after, grown)] if grown else [])])


def _more(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> int:
    """By how much a counter is higher; one that is not told is not known to be, and a lower one was set back by somebody."""
    was, now = before.get(name), after.get(name)
    return max(0, now - was) if isinstance(was, int) and isinstance(now, int) else 0


def _told(before: Mapping[str, Any], after: Mapping[str, Any], names: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {before[name]} -> {after[name]}" for name in names)
