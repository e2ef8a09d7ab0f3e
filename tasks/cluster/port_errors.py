"""Errors that the ports of InfiniBand and RoCE adapters counted while the collectives ran over them."""

from collections.abc import Mapping
from typing import Any

from tasks.cluster.evidence import Evidence
from tasks.cluster.inventory_gates import dicts_of
from tasks.contracts.cluster_report import Finding, Status
from tasks.hardware.infiniband import BROKEN, NOISY

BEFORE, AFTER = "ports_before", "ports_after"
"""Facts of each node's first process in the collectives: its ports at the beginning and at the end."""
ACTIONS = {
    Status.FAIL: "reseat or replace the cable and its transceivers; see the switch's log of that port; drain the node",
    Status.WARN: "see whether it comes again: clean or reseat the cable; on RoCE look at flow control (PFC, ECN) on the way",
}


def port_findings(evidence: Evidence) -> list[Finding]:
    """One gate, where several nodes have such ports; none where the stage did not end, which has a finding of its own.

    A link that failed under load is a FAIL. What got lost and came again is a WARN: a link may lose a little, and how much
    of it costs anything the bandwidths tell.
    """
    outcome = evidence.outcomes.get("collectives")
    if outcome is None or outcome.state != "done" or evidence.check.pool.num_nodes < 2:
        return []
    broken: dict[str, str] = {}
    noisy: dict[str, str] = {}
    num_ports = 0
    for record in evidence.records.get("collectives", ()):
        if record.process != 0:
            continue
        node = evidence.node_of(record)
        before, after = (_by_place(record.facts.get(name)) for name in (BEFORE, AFTER))
        num_ports += len(before)
        for place, port in before.items():
            now = after.get(place)
            where = f"{node}/{place}"
            if now is None:
                broken[where] = "is not there any more"
            elif port.get("state") == "ACTIVE" != now.get("state"):
                broken[where] = f"is {now.get('state') or 'not told'} now"
            elif what := _grown(port, now, BROKEN):
                broken[where] = what
            elif what := _grown(port, now, NOISY):
                noisy[where] = what
    if not num_ports:
        return []
    bad = broken or noisy
    status = Status.FAIL if broken else Status.WARN if noisy else Status.PASS
    return [
        Finding(
            stage="collectives", gate="port_errors", status=status, layer="limit", culprits=tuple(bad),
            detail="; ".join(f"{where}: {what}" for where, what in list(bad.items())[:8]) or "no port counted any",
            action=ACTIONS.get(status, ""),
        )
    ]  # fmt: skip


def _by_place(ports: Any) -> dict[str, Mapping[str, Any]]:
    """By adapter; with its number where an adapter has several ports."""
    return {
        f"{port.get('device')}" + ("" if port.get("port") == "1" else f":{port.get('port')}"): port
        for port in dicts_of(ports)
    }


def _grown(before: Mapping[str, Any], after: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """What counts more than before. Not every adapter has every counter; one that is not told any more is no zero, and one
    that is lower was set back by somebody.
    """
    changed = [
        f"{name} {was} -> {now}"
        for name in names
        if isinstance(was := before.get(name), int) and (not isinstance(now := after.get(name), int) or now > was)
    ]
    return ", ".join(changed) or None
