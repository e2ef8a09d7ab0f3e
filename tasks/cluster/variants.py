"""All-reduce measured again between nodes as NCCL would not do it by itself: by the ring alone, and over one rail at a time.

NCCL reads these variables once a process, so each variant is a job of its own. The ring tells a slow fabric from a bad choice
of algorithm; a rail alone (the adapters of one name on all nodes) shows what the others make up for while all are in use.

Source of the variables: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tasks.cluster.evidence import GAVE_WAY, Evidence
from tasks.cluster.inventory_gates import dicts_of
from tasks.cluster.transport import adapters_of
from tasks.contracts.cluster_report import Finding, Status, VariantOutcome
from tasks.contracts.cluster_settings import CollectiveProbeSettings, VariantKind

HAVE_A_RING = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")
"""The others are sends and receives, which have no algorithm to choose."""
LARGEST_ON_A_RAIL = 1 << 30
"""Through one adapter this takes 20 times 40 ms; more bytes tell nothing more of it."""
INFINIBAND = "InfiniBand"


@dataclass(frozen=True)
class Variant:
    """One job of collectives.

    Attributes:
        name: ``ring``, ``rail mlx5_3``.
        environment: of the ranks, over whatever the pool's settings say.
        prefix: of its figures.
        rail: the adapter; None: all of them.
    """

    name: str
    environment: Mapping[str, str]
    prefix: str
    operations: tuple[str, ...]
    sizes_bytes: tuple[int, ...]
    rail: str | None = None

    @property
    def job_name(self) -> str:
        """Of its folder, beside the stage's own."""
        return f"collectives_{self.name.replace(' ', '_')}"

    def arguments(self) -> dict[str, Any]:
        """What the ranks are told."""
        return asdict(self)


def variants_of(evidence: Evidence) -> dict[VariantKind, list[Variant] | str]:
    """The variants that the settings ask for, or why there are none of a kind."""
    check = evidence.check
    outcome = evidence.outcomes.get("collectives")
    found: dict[VariantKind, list[Variant] | str] = {}
    for kind in check.collectives.variants:
        if not check.pool.gpus:
            found[kind] = "gloo has neither NCCL's algorithms nor its adapters to choose from (pool.gpus is off)"
        elif check.pool.num_nodes < 2:
            found[kind] = "nothing goes between nodes: there is one (pool.num_nodes)"
        elif outcome is None or outcome.state != "done":
            found[kind] = "collectives did not end well as NCCL does them by itself"
        else:
            found[kind] = _ring(check.collectives) if kind == "ring" else _rails(evidence)
    return found


def _ring(settings: CollectiveProbeSettings) -> list[Variant] | str:
    operations = tuple(name for name in settings.operations if name in HAVE_A_RING)
    if not operations:
        return f"none of collectives.operations has a ring; those that have are {', '.join(HAVE_A_RING)}"
    return [Variant("ring", {"NCCL_ALGO": "Ring"}, "ring_", operations, settings.sizes_bytes())]


def _rails(evidence: Evidence) -> list[Variant] | str:
    rails = rails_of(evidence)
    if len(rails) < 2:
        told = ", ".join(rails) or "none"
        return (
            f"a rail is held against the others, and NCCL uses {told} of the active InfiniBand adapters on every node"
        )
    sizes = evidence.check.collectives.sizes_bytes()
    size = max((size for size in sizes if size <= LARGEST_ON_A_RAIL), default=sizes[0])
    # With "=" the name is the whole one: mlx5_1 would mean mlx5_10 as well.
    return [
        Variant(f"rail {rail}", {"NCCL_IB_HCA": f"={rail}"}, "rail_", ("all_reduce",), (size,), rail) for rail in rails
    ]


def rails_of(evidence: Evidence) -> list[str]:
    """The InfiniBand adapters that are active and that NCCL uses by itself, on every node: one for storage is none of them."""
    nodes: list[set[str]] = []
    for record in evidence.records.get("inventory", ()):
        if record.process == 0:
            ports = dicts_of(record.facts.get("infiniband"))
            nodes.append(
                {
                    str(p.get("device"))
                    for p in ports
                    if p.get("state") == "ACTIVE" and p.get("link_layer") == INFINIBAND
                }
            )
    for record in evidence.records.get("collectives", ()):
        if record.process == 0:
            nodes.append(adapters_of(record))
    return sorted(set.intersection(*nodes), key=lambda name: (len(name), name)) if nodes else []


def variant_findings(evidence: Evidence) -> list[Finding]:
    """Whether each variant was measured, and as it was meant to be; the figures have gates of their own."""
    if "collectives" not in evidence.check.stages:
        return []
    findings: list[Finding] = []
    outcome = evidence.outcomes.get("collectives")
    ended = {v.name: v for v in outcome.variants} if outcome is not None else {}
    for kind, variants in variants_of(evidence).items():
        if isinstance(variants, str):
            findings.append(_finding(kind, Status.SKIP, variants))
            continue
        findings += [_measured(variant, ended.get(variant.name), evidence) for variant in variants]
    gave_way = [v for v in ended.values() if v.state == "yielded"]
    if gave_way:
        told = f"not measured: {', '.join(v.name for v in gave_way)}: {gave_way[0].error}"
        findings.append(_finding(GAVE_WAY, Status.SKIP, told))
    return findings


def _measured(variant: Variant, ended: VariantOutcome | None, evidence: Evidence) -> Finding:
    culprits = (variant.name,) if variant.rail else ()
    if ended is None:
        return _finding(variant.name, Status.FAIL, "was to be measured and was not")
    if ended.state == "yielded":
        return _finding(variant.name, Status.SKIP, ended.error)
    if ended.state == "error":
        return _finding(
            variant.name, Status.ERROR, ended.error, action="see that the pool's scheduler answers and takes such jobs"
        )
    if ended.state == "failed":
        action = "see this rail's adapters, cables and switch on every node: ibstat, ibdiagnet" if variant.rail else ""
        return _finding(variant.name, Status.FAIL, ended.error, culprits, action or "read the logs of its job")
    records = evidence.variants.get(variant.name, ())
    known = {record.rank for record in records}
    silent = [rank for rank in range(evidence.check.pool.world_size) if rank not in known]
    if silent:
        # Of this job's own records: a scheduler may have numbered its nodes otherwise than the stage's.
        places = replace(evidence, records={**evidence.records, variant.name: records}).places_of_ranks(variant.name)
        return _finding(
            variant.name, Status.FAIL, "no readable record of rank " + ", ".join(map(str, silent)),
            tuple(places[rank] for rank in silent), "read this process's log, and its record in the job's folder",
        )  # fmt: skip
    wrong = {
        evidence.node_of(record): sorted(adapters_of(record))
        for record in records
        if variant.rail and record.process == 0 and adapters_of(record) != {variant.rail}
    }
    if wrong:
        told = "; ".join(f"{node}: {', '.join(used) or 'none that it told'}" for node, used in wrong.items())
        return _finding(
            variant.name, Status.ERROR, f"NCCL used other adapters than {variant.rail}: {told}",
            action="its figure is of no one rail; see NCCL_IB_HCA in /etc/nccl.conf and NCCL's log in the job's folder",
        )  # fmt: skip
    return _finding(
        variant.name, Status.PASS, "measured with " + " ".join(f"{k}={v}" for k, v in variant.environment.items())
    )


def _finding(gate: str, status: Status, detail: str, culprits: tuple[str, ...] = (), action: str = "") -> Finding:
    return Finding(
        stage="collectives", gate=gate, status=status, layer="presence", detail=detail, culprits=culprits, action=action
    )


def expected_of_variants(evidence: Evidence, *, done: bool = True) -> list[tuple[str, str, int | None, str]]:
    """Figures of the variants that ended well, or of those that did not: ``(stage, name, size, place)``."""
    outcome = evidence.outcomes.get("collectives")
    ended = {v.name for v in outcome.variants if v.state == "done"} if outcome is not None else set()
    variants = [
        v
        for found in variants_of(evidence).values()
        if not isinstance(found, str)
        for v in found
        if (v.name in ended) is done
    ]
    return [
        (
            "collectives",
            f"{variant.prefix}{operation}_busbw_gbytes_per_s",
            size,
            variant.name if variant.rail else "all",
        )
        for variant in variants
        for operation in variant.operations
        for size in variant.sizes_bytes
    ]
