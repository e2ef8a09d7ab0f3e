"""Every setting of a cluster check; the Prefect UI makes its form of this module."""

from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from tasks.contracts.frozen_settings import Settings
from tasks.contracts.pool_settings import PoolSettings
from tasks.contracts.settings import StorageSettings

Stage = Literal["inventory", "devices", "collectives", "storage", "training", "endurance"]
STAGES: tuple[Stage, ...] = ("inventory", "devices", "collectives", "storage", "training", "endurance")
"""In the order in which they run."""
Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv"]
VariantKind = Literal["ring", "rails"]
Shape = Literal["toy", "lora-1b", "lora-8b"]
FaultKind = Literal[
    "sleep", "half_threads", "corrupt", "wrong_version", "read_only", "full_disk", "dead", "hang", "nan"
]


class DeviceProbeSettings(Settings):
    """What each GPU, or CPU process, is made to do."""

    matrix_size: int = Field(default=8192, ge=64, le=65536)
    """Rows and columns of the matrices that are multiplied."""
    warmup_s: float = Field(default=5.0, ge=0)
    """Load before anything is timed: cold chips run faster than they can go on."""
    num_repeats: int = Field(default=30, ge=3)
    """Timed repetitions of each product and copy."""
    copy_mbytes: int = Field(default=1024, ge=1)
    """Size of the arrays that are copied (1 MB = 10^6 bytes)."""
    memory_share: float = Field(default=0.5, gt=0, le=0.95)
    """Share of the free memory that the pattern test writes and reads back."""
    max_pattern_mbytes: int | None = Field(default=None, ge=1)
    """Limit of the same, for machines whose memory others use; empty: none."""


class CollectiveProbeSettings(Settings):
    """Which messages travel."""

    operations: tuple[Collective, ...] = (
        "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv",
    )  # fmt: skip
    """Collectives that are timed and whose results are compared with what they must be."""
    min_kib: float = Field(default=1, gt=0)
    """Smallest message (1 KiB = 1024 bytes)."""
    max_mib: float = Field(default=8192, gt=0)
    """Largest message (1 MiB = 1024 KiB)."""
    size_factor: int = Field(default=4, ge=2, le=1024)
    """Each size is this many times the one before."""
    num_repeats: int = Field(default=20, ge=3)
    """Timed repetitions of each collective at each size."""
    pair_mib: float = Field(default=64, gt=0)
    """Message of the test of all pairs."""
    max_pair_ranks: int = Field(default=64, ge=2)
    """Up to so many ranks all pairs are measured; above it the first rank of every node stands for its node."""
    variants: tuple[VariantKind, ...] = ("ring", "rails")
    """Measured again between nodes with GPUs, each in a job of its own: `ring` with NCCL's ring algorithm alone, `rails` the
    all-reduce over one InfiniBand adapter of each node at a time, where NCCL uses several."""

    def sizes_bytes(self) -> tuple[int, ...]:
        """The sizes from smallest to largest."""
        sizes, size = [], int(self.min_kib * 1024)
        while size <= self.max_mib * 1024**2:
            sizes.append(size)
            size *= self.size_factor
        # The largest that was asked for, whatever the factor meets.
        largest = int(self.max_mib * 1024**2)
        return (*sizes, largest) if sizes and sizes[-1] < largest else tuple(sizes)

    @model_validator(mode="after")
    def _some_size(self) -> Self:
        if self.min_kib > self.max_mib * 1024:
            raise ValueError(f"min_kib={self.min_kib:g} is more than max_mib={self.max_mib:g}: no size is left")
        return self


class StorageProbeSettings(Settings):
    """What the filesystems are asked for, by all nodes at once."""

    file_mbytes: int = Field(default=2048, ge=1)
    """File that each node writes and reads, as large as a checkpoint (1 MB = 10^6 bytes)."""
    num_repeats: int = Field(default=3, ge=1)
    """How often it does so, and the same with small files, all nodes beginning together each time; the median counts."""
    num_small_files: int = Field(default=200, ge=1)
    """Files of 4 KiB that each node creates, syncs and opens again."""


class TrainingProbeSettings(Settings):
    """The real training program on a fixed shape."""

    shape: Shape = "lora-8b"
    """`toy`: seconds on a CPU. `lora-1b`, `lora-8b`: LoRA of rank 64 over Llama 3.2 1B's and 3.1 8B's shapes with random
    weights, 4096 tokens a row."""
    num_steps: int = Field(default=12, ge=4)
    """Optimiser steps of each run; the first quarter warms up and is not counted."""


class ThresholdSettings(Settings):
    """When a figure is not good enough; every limit that was used stands in the report."""

    # Nothing would ever miss a limit of NaN.
    model_config = ConfigDict(allow_inf_nan=False)
    profile: Literal["physical", "reference"] = "physical"
    """`physical`: shares of what chip and fabric can do (tasks/hardware/reference.yaml). `reference`: also the limits of the
    acceptance suite that this one replaces, where they are stricter: all-reduce of 1 GiB > 350 GB/s, > 500 tokens/s/GPU, > 90 %
    scaling efficiency."""
    floor_share: float = Field(default=0.85, gt=0, le=1)
    """Share of a chip's or fabric's reference figure that is the floor."""
    fleet_effect: float = Field(default=0.08, gt=0, lt=1)
    """A GPU, node or pair is an outlier if it is worse than the median by this share and by `fleet_deviations`."""
    fleet_deviations: float = Field(default=4.0, gt=0)
    """Scaled median absolute deviations from the median."""
    history_effect: float = Field(default=0.1, gt=0, lt=1)
    """A figure has drifted if it is worse than the median of its own history by this share and `fleet_deviations`."""
    storage_effect: float = Field(default=0.5, gt=0, lt=1)
    """The least such share for filesystems, in fleet and history: others use them as well."""
    min_history: int = Field(default=5, ge=3)
    """Earlier runs on the same hardware and software without which there is no history to compare with."""
    max_lateness_ms: float = Field(default=2.0, gt=0)
    """A rank that comes so much later than the others to collectives, at the median, holds them up."""
    max_clock_skew_s: float = Field(default=1.0, gt=0)
    """Difference between the nodes' clocks."""
    max_slowdown_share: float = Field(default=0.05, ge=0, lt=1)
    """By what share products may be slower at the end of `soak_minutes` than at their beginning."""
    min_scaling_efficiency: float = Field(default=0.85, gt=0, le=1)
    """Training throughput per rank on all ranks, as a share of one rank's by itself."""
    min_share_of_product_rate: float = Field(default=0.2, gt=0, le=1)
    """Useful work of training on GPUs, as a share of the product rate that the devices themselves reached."""
    overrides: dict[str, float] = Field(
        default_factory=dict, examples=[{"all_reduce_busbw_gbytes_per_s@1073741824": 350}]
    )
    """Limits of single gates by their names in the report, with `@` and the bytes where a gate has sizes: they take the
    place of the floor. Lowest for bandwidths and rates, highest for times."""


class ReactionSettings(Settings):
    """What is done to nodes that a FAIL accuses: nothing, unless it is asked for."""

    mode: Literal["none", "dry_run", "drain"] = "none"
    """`dry_run`: say exactly what would be done, and do nothing. `drain`: drain the node on Slurm, taint it (NoSchedule) on
    Kubernetes; what runs there goes on, nothing new starts. Try `dry_run` first."""
    max_nodes: int = Field(default=1, ge=1)
    """At most so many nodes are taken out of use by one check. Where more are accused none is: what so many have in common
    may be to blame, or the check."""
    max_share: float = Field(default=0.1, gt=0, le=0.5)
    """And at most this share of the check's nodes, rounded down, but one."""


class InjectedFault(Settings):
    """A fault that the check does to itself, to prove that its gates find it. Such a run is marked and kept out of history."""

    kind: FaultKind
    """What goes wrong."""
    node: int = Field(default=1, ge=0)
    """On which node."""
    process: int = Field(default=0, ge=0)
    """In which of its processes."""


class ClusterCheck(Settings):
    """One check of a cluster."""

    cluster: str = Field(default="cluster", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Name of the cluster: runs of the same name are one history."""
    stages: tuple[Stage, ...] = ("inventory", "devices", "collectives", "storage", "training")
    """What is done, in this order. What is left out is reported as SKIP."""
    chip: str = "auto"
    """Chip whose reference figures are the floor, as in tasks/hardware/reference.yaml; `auto` goes by the device's name."""
    node_fabric: str = "auto"
    """Fabric between the GPUs of a node, as in tasks/hardware/reference.yaml; `auto`: the chip's usual one."""
    cluster_fabric: str = "auto"
    """Fabric between nodes; `auto`: read off InfiniBand's ports, else there is no floor and the report says so."""
    devices: DeviceProbeSettings = DeviceProbeSettings()
    collectives: CollectiveProbeSettings = CollectiveProbeSettings()
    storage_probe: StorageProbeSettings = StorageProbeSettings()
    training: TrainingProbeSettings = TrainingProbeSettings()
    soak_minutes: float = Field(default=10.0, gt=0)
    """How long the stage `endurance` keeps all devices under load."""
    stall_limit_s: float = Field(default=60.0, gt=0)
    """A rank that does not come to the next measurement for so long is reported as hung."""
    thresholds: ThresholdSettings = ThresholdSettings()
    reaction: ReactionSettings = ReactionSettings()
    inject: InjectedFault | None = None
    """Prove the gates: do this to one process. Empty: nothing."""
    pool: PoolSettings = PoolSettings(max_retries=0, time_limit_minutes=20)
    storage: StorageSettings = StorageSettings()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if "inventory" not in self.stages:
            raise ValueError("stages: inventory must be among them, all other figures are judged by what it finds")
        if "endurance" in self.stages and self.soak_minutes >= self.pool.time_limit_minutes:
            raise ValueError(
                f"soak_minutes={self.soak_minutes:g} does not fit into a job of pool.time_limit_minutes="
                f"{self.pool.time_limit_minutes:g}; allow it some minutes more than the soak"
            )
        if self.reaction.mode != "none" and self.pool.backend == "local":
            raise ValueError(
                f"reaction.mode={self.reaction.mode}: pool.backend=local has no scheduler that could take a node out of use; "
                "set reaction.mode=none, or pool.backend to slurm or kubernetes"
            )
        if self.reaction.mode == "drain" and self.inject is not None:
            raise ValueError(
                f"reaction.mode=drain: inject={self.inject.kind} does a fault to a sound node, which must not be drained for it; "
                "set reaction.mode=dry_run"
            )
        if self.inject is not None and (
            self.inject.node >= self.pool.num_nodes or self.inject.process >= self.pool.processes_per_node
        ):
            raise ValueError(
                f"inject: there is no process {self.inject.process} on node {self.inject.node}; the pool has "
                f"{self.pool.num_nodes} nodes x {self.pool.processes_per_node} processes"
            )
        return self
