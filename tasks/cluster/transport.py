"""What NCCL really chose, from its own log (NCCL_DEBUG=INFO): the silent fallback to TCP is the failure to catch.

Lines that are read, as NCCL 2.18 to 2.28 write them::

    node0:123:456 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB eth0:10.0.0.1<0>
    node0:123:456 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.1<0>
    node0:123:456 [0] NCCL INFO Using network Socket
    node0:123:456 [0] NCCL INFO Channel 00/0 : 0[0] -> 8[0] [send] via NET/IB/0/GDRDMA
    node0:123:456 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.cluster.evidence import NOT_RUN, Evidence
from tasks.cluster.inventory_gates import dicts_of
from tasks.contracts.cluster_report import Finding, RankRecord, Status

NETWORK = re.compile(r"NCCL INFO Using network (\S+)")
ADAPTER = re.compile(r"\[\d+\](\w+):\d+/(?:IB|RoCE)")
CHANNEL = re.compile(r"NCCL INFO Channel \S+ ?: (\d+)\[\w+\] -> (\d+)\[\w+\].*? via (\S+)")

ACTION = (
    "check that the RDMA devices reach the job (ibstat in it), NCCL_IB_HCA, and pool.network; "
    "where there is Ethernet alone between nodes say so: cluster_fabric=ethernet"
)


def listen(folder: Path) -> None:
    """Let NCCL write its log into files of the attempt's folder, one a rank; before the first communicator."""
    os.environ |= {
        "NCCL_DEBUG": "INFO",
        "NCCL_DEBUG_SUBSYS": "INIT,NET,GRAPH,ENV",
        # By the rank and not by the process's number, which in pods is the same on every node.
        "NCCL_DEBUG_FILE": str(_log(folder)),
        # Pairs talk one after the other by design; torch warns of that at every message otherwise.
        "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "false",
    }


def own_log(folder: Path) -> list[str]:
    """What NCCL wrote of this process; nothing where it wrote nothing."""
    path = _log(folder)
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def _log(folder: Path) -> Path:
    return folder / f"nccl.rank-{os.environ['RANK']}.log"


@dataclass(frozen=True)
class Transport:
    """One node's choice.

    Attributes:
        network: ``IB``, ``Socket`` or a plugin's name; None: NCCL did not say.
        adapters: InfiniBand or RoCE adapters in use.
        channels: number of channels by transport, as ``NET/IB``, ``P2P``, ``SHM``.
    """

    network: str | None
    adapters: tuple[str, ...]
    channels: Mapping[str, int]

    def facts(self) -> dict[str, Any]:
        """As it stands in the report."""
        return {"network": self.network, "adapters": list(self.adapters), "channels": dict(self.channels)}


def read_transport(lines: Iterable[str]) -> Transport:
    """What one node's log says; lines that are none of NCCL's, or broken, say nothing."""
    network: str | None = None
    adapters: set[str] = set()
    channels: Counter[str] = Counter()
    for line in lines:
        if "NCCL INFO" not in line:
            continue
        if found := NETWORK.search(line):
            network = found[1]
        if "NET/IB : Using" in line:
            adapters |= set(ADAPTER.findall(line))
        if found := CHANNEL.search(line):
            parts = found[3].split("/")
            channels["/".join(parts[:2]) if parts[0] == "NET" else parts[0]] += 1
    return Transport(network, tuple(sorted(adapters)), channels)


def transport_findings(evidence: Evidence) -> list[Finding]:
    """The transport between nodes is the fast one where there are adapters for it; nothing is told without GPUs."""
    check = evidence.check
    outcome = evidence.outcomes.get("collectives")
    if not check.pool.gpus or check.pool.num_nodes < 2 or outcome is None or outcome.state in NOT_RUN:
        return []
    wants_sockets = check.pool.network == "ethernet" or check.cluster_fabric == "ethernet"
    bad: dict[str, str] = {}
    seen: set[int] = set()
    for record in evidence.records.get("collectives", ()):
        transport = record.facts.get("transport")
        if record.process != 0:
            continue
        seen.add(record.node)
        node = evidence.node_of(record)
        if not isinstance(transport, dict):
            bad[node] = "NCCL's transport was not told"
            continue
        is_socket = transport.get("network") == "Socket" or "NET/Socket" in (transport.get("channels") or {})
        if transport.get("network") is None:
            bad[node] = "NCCL's transport was not told"
        elif is_socket and not wants_sockets:
            bad[node] = "NCCL goes over TCP sockets instead of the fast fabric"
    adapters = _adapters(evidence)
    most = max(adapters.values(), default=0)
    ports = {
        evidence.node_of(r): sum(port.get("state") == "ACTIVE" for port in dicts_of(r.facts.get("infiniband")))
        for r in evidence.records.get("inventory", ())
        if r.process == 0
    }
    for node, count in adapters.items():
        # One for each GPU, as far as there are: all nodes may be short of them alike.
        needed = 0 if wants_sockets else min(ports.get(node, 0), check.pool.processes_per_node)
        if count < most:
            bad.setdefault(node, f"NCCL uses {count} adapters, on other nodes {most}")
        elif count < needed:
            bad.setdefault(
                node, f"NCCL uses {count} of {ports[node]} active adapters for {check.pool.processes_per_node} GPUs"
            )
    if not bad and len(seen) < check.pool.num_nodes:
        # `finished` tells who left none.
        told = f"known of {len(seen)} of {check.pool.num_nodes} nodes"
        return [Finding(stage="collectives", gate="transport", status=Status.SKIP, layer="presence", detail=told)]
    return [
        Finding(
            stage="collectives", gate="transport", status=Status.FAIL if bad else Status.PASS, layer="limit", culprits=tuple(bad),
            detail="; ".join(f"{node}: {what}" for node, what in bad.items()) or f"{most} adapters on every node",
            action=ACTION if bad else "",
        )
    ]  # fmt: skip


def _adapters(evidence: Evidence) -> dict[str, int]:
    return {
        evidence.node_of(record): len(adapters_of(record))
        for record in evidence.records.get("collectives", ())
        if record.process == 0 and isinstance(record.facts.get("transport"), dict)
    }


def adapters_of(record: RankRecord) -> set[str]:
    """The InfiniBand or RoCE adapters that NCCL used in a rank; none where it did not say."""
    transport = record.facts.get("transport")
    adapters = transport.get("adapters") if isinstance(transport, dict) else None
    return {str(name) for name in adapters} if isinstance(adapters, list) else set()
