"""Everything that a check left on the shared folder, read without trust: what cannot be read is itself a finding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from tasks.contracts.cluster_report import Figure, Placed, RankRecord, StageOutcome
from tasks.contracts.cluster_settings import ClusterCheck

History = Mapping[str, Sequence[float]]
"""Earlier values of each figure by :func:`history_key`, oldest first."""
NOT_RUN = ("skipped", "yielded", "error")
"""States of a stage of which nothing was measured."""
SHARED_IS_FULL = "shared_has_space"
"""The gate of writes that the shared filesystem refused for want of space, which accuse no node."""
GAVE_WAY = "gave_way"
"""The gate of what the pool was taken from: a check with one is no verdict, whatever else of it says."""


@dataclass(frozen=True)
class Evidence:
    """What a verdict is made of.

    Attributes:
        outcomes: of every stage that the settings name.
        records: of each stage's ranks, in their order; those that left none are missing.
        unreadable: of each stage, ``(rank, why)`` of records that cannot be read.
        training: figures of the training program's runs.
        training_of_ranks: a figure of each rank of the widest of them, by its number; none where ranks are not compared.
        history: see :data:`History`.
        notes: what is not known, and why.
        variants: records of the ranks of each variant of the collectives, by its name.
        own_versions: of the process that submitted the jobs; they decide who is wrong where two halves differ.
    """

    check: ClusterCheck
    outcomes: Mapping[str, StageOutcome]
    records: Mapping[str, Sequence[RankRecord]]
    unreadable: Mapping[str, Sequence[tuple[int, str]]] = field(default_factory=dict)
    training: Sequence[Figure] = ()
    history: History = field(default_factory=dict)
    num_history: int = 0
    notes: Sequence[str] = ()
    own_versions: Mapping[str, str] = field(default_factory=dict)
    training_of_ranks: Sequence[Figure] = ()
    variants: Mapping[str, Sequence[RankRecord]] = field(default_factory=dict)

    @cached_property
    def are_hosts_shared(self) -> bool:
        """Whether several nodes of a stage are one host, as emulated ones are; their numbers then tell them apart."""
        return any(
            len({record.host for record in records}) < len({record.node for record in records})
            for records in self.records.values()
        )

    @cached_property
    def scheduler_nodes(self) -> frozenset[str]:
        """The names by which the scheduler knows the nodes that left records; none on this machine, which has no scheduler."""
        if self.check.pool.backend == "local":
            return frozenset()
        return frozenset(r.scheduler_node for records in self.records.values() for r in records if r.scheduler_node)

    def node_of(self, record: RankRecord) -> str:
        """The name of the node that left a record: the scheduler's or its host's, since every stage may number nodes anew."""
        if record.scheduler_node in self.scheduler_nodes:
            return str(record.scheduler_node)
        return f"node{record.node}" if self.are_hosts_shared else record.host

    def place(self, record: RankRecord) -> str:
        """Where a process runs, as ``host-1/gpu3``."""
        return f"{self.node_of(record)}/{'gpu' if self.check.pool.gpus else 'process'}{record.process}"

    def node_name(self, stage: str, node: int) -> str:
        """The name of a stage's node, known or not; only a record of that very stage tells."""
        # Where nodes have names of the scheduler's, `node1` may be that of another one.
        unknown = f"node number {node}" if self.scheduler_nodes else f"node{node}"
        return next((self.node_of(r) for r in self.records.get(stage, ()) if r.node == node), unknown)

    def places_of_ranks(self, stage: str) -> dict[int, str]:
        """The place of each rank of a stage; of ranks without a record, by the usual order."""
        width, found = self.check.pool.processes_per_node, {r.rank: self.place(r) for r in self.records.get(stage, ())}
        unit = "gpu" if self.check.pool.gpus else "process"
        # A missing rank is on the node that has fewer records than it has processes.
        nodes = {rank: record.node for record in self.records.get(stage, ()) for rank in [record.rank]}
        for rank in range(self.check.pool.world_size):
            if rank not in found:
                block = [nodes[r] for r in range(rank // width * width, (rank // width + 1) * width) if r in nodes]
                free = [n for n in range(self.check.pool.num_nodes) if n not in nodes.values()]
                node = block[0] if block else free[0] if len(free) == 1 else rank // width
                found[rank] = f"{self.node_name(stage, node)}/{unit}{rank % width}"
        return found

    def placed(self) -> list[Placed]:
        """Every figure with its place."""
        found: list[Placed] = []
        for stage, records in self.records.items():
            places = self.places_of_ranks(stage)
            for record in records:
                for figure in record.figures:
                    if figure.peer is not None and figure.peer.isdecimal():
                        figure = figure.model_copy(update={"peer": places.get(int(figure.peer), figure.peer)})
                    found.append(Placed(stage=stage, place=_place(figure.name, self, record), figure=figure))
        for records in self.variants.values():
            for record in records:
                found += [
                    Placed(stage="collectives", place=_place(figure.name, self, record), figure=figure)
                    for figure in record.figures
                ]
        found += [Placed(stage="training", place="all", figure=figure) for figure in self.training]
        places = self.places_of_ranks("training")
        return found + [
            Placed(stage="training", place=places[rank], figure=figure)
            for rank, figure in enumerate(self.training_of_ranks)
        ]


def _place(name: str, evidence: Evidence, record: RankRecord) -> str:
    """Bandwidths of a group belong to all of it, whichever rank wrote them down; a filesystem's to the node."""
    if name.startswith(("shared_", "scratch_", "memory_total", "load_per", "clock_ahead")):
        return evidence.node_of(record)
    if name.startswith("node_"):
        return evidence.node_of(record)
    if name.startswith("rail_"):
        return f"rail {record.facts.get('rail', 'not told')}"
    group = ("all_", "reduce_scatter", "broadcast", "send_recv", "ring_")
    return "all" if name.startswith(group) else evidence.place(record)


def read_records(folder: Path) -> tuple[list[RankRecord], list[tuple[int, str]]]:
    """The records of one attempt and, of those that cannot be read, the rank and why."""
    records: list[RankRecord] = []
    unreadable: list[tuple[int, str]] = []
    for path in sorted(folder.glob("rank-*.json")):
        number = path.stem.removeprefix("rank-")
        if not number.isdigit():
            continue
        try:
            records.append(RankRecord.model_validate_json(path.read_bytes()))
        except (ValidationError, OSError) as error:
            unreadable.append((int(number), f"{path.name}: {str(error).splitlines()[0]}"))
    return records, unreadable


def history_key(placed: Placed) -> str:
    """The name under which a figure is kept: ``collectives/all_reduce_busbw_gbytes_per_s/1048576/all``."""
    figure = placed.figure
    # Names of drifted figures are kept in one line, with a space between them.
    place = placed.place.replace(" ", "_")
    parts = [placed.stage, figure.name, str(figure.size_bytes) if figure.size_bytes is not None else "", place]
    if figure.peer is not None:
        parts.append(f"to {figure.peer}")
    return "/".join(part for part in parts if part)
