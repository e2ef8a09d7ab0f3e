"""Evidence of clusters that are not here: sound ones, which a test then makes unsound in one place."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tasks.cluster.evidence import Evidence
from tasks.cluster.expected import expected_figures
from tasks.cluster.figure_gates import References
from tasks.cluster.judge import judge, references_of
from tasks.cluster.port_errors import AFTER, BEFORE, WATCHED
from tasks.cluster.variants import Variant, variants_of
from tasks.contracts.cluster_report import Figure, Finding, RankRecord, StageOutcome, Status, VariantOutcome
from tasks.contracts.cluster_settings import STAGES, ClusterCheck
from tasks.hardware.infiniband import BROKEN, NOISY
from tasks.hardware.reference import fabric_of

GPU = {
    "uuid": "GPU-0", "name": "NVIDIA H100 80GB HBM3", "driver": "570.86.15", "memory_gbytes": 85.5, "power_limit_watts": 700.0,
    "max_sm_clock_mhz": 1980, "persistence": True, "ecc": True, "ecc_uncorrected": 0, "remapped_uncorrected": 0,
    "remapped_corrected": 0, "remap_pending": False, "remap_failed": False, "pcie_generation": 5, "max_pcie_generation": 5,
    "pcie_width": 16, "max_pcie_width": 16, "nvlinks_up": 18, "nvlinks": 18, "busy_processes": [],
}  # fmt: skip
PORT = {"device": "mlx5_0", "port": "1", "link_layer": "InfiniBand", "state": "ACTIVE", "rate_gbits_per_s": 400.0,
        **dict.fromkeys(BROKEN + NOISY, 0)}  # fmt: skip
TOPOLOGY = {"gpus": {"SYS": 7}, "adapters": {"PIX": 1, "SYS": 7}}
FACTS = {
    "python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0", "peft": "0.21.2", "datasets": "5.2.0",
    "accelerate": "1.15.0", "cuda": "13.0", "nccl": "2.28.3", "kernel": "6.8.0", "num_processors": 128, "num_threads": 16,
    "governor": "performance", "processor": "Xeon",
}  # fmt: skip
SOUND = {
    "matrix_product_bfloat16_tflops_per_s": 740.0, "matrix_product_float32_tflops_per_s": 50.0,
    "memory_copy_gbytes_per_s": 2900.0, "host_to_device_gbytes_per_s": 55.0, "device_to_host_gbytes_per_s": 55.0, "step_s": 0.004,
    "memory_pattern_wrong_bytes": 0.0, "throttled_share": 0.0, "lateness_s": 0.00002, "training_tokens_per_s_per_gpu": 12000.0,
    "training_loss_difference": 0.0, "training_first_loss_difference": 0.0,
    "training_scaling_efficiency": 0.97,
    "training_work_us_per_token": 70.0, "training_share_of_product_rate": 0.6, "endurance_product_tflops_per_s": 740.0,
    "endurance_slowdown_share": 0.01, "endurance_throttled_share": 0.0,
}  # fmt: skip
"""By name; bandwidths between GPUs follow the reference, the rest is 1."""


class Cluster:
    """The records of a sound cluster, to be changed before it is judged."""

    def __init__(self, num_nodes: int = 2, width: int = 8, *, gpus: bool = True, **check: Any) -> None:
        pool = {"num_nodes": num_nodes, "processes_per_node": width, "gpus": gpus, "max_retries": 0}
        self.check = ClusterCheck(**{"pool": pool, "collectives": {"size_factor": 64}, **check})
        # Every stage has an outcome, as in a real check; those that nobody asked for were left out.
        self.outcomes = {
            stage: StageOutcome(stage=stage, state="done", seconds=1.0) if stage in self.check.stages
            else StageOutcome(stage=stage, state="skipped", error="not asked for")
            for stage in STAGES
        }  # fmt: skip
        self.history: Mapping[str, Sequence[float]] = {}
        self.own_versions: Mapping[str, str] = {}
        self.records: dict[str, list[RankRecord]] = {
            stage: [self._record(rank, width, num_nodes) for rank in range(num_nodes * width)]
            for stage in self.check.stages if stage != "training"
        }  # fmt: skip
        self.training: list[Figure] = []
        self.training_of_ranks: list[Figure] = []
        self.variants: dict[str, list[RankRecord]] = {}
        self.change("inventory", self._with_inventory)
        self.change("endurance", self._with_gpus_again)
        self.change("devices", lambda r: r.model_copy(update={"facts": {"step_sha256": "same"}}))
        transport = {
            "network": "IB",
            "adapters": [f"mlx5_{i}" for i in range(8)],
            "channels": {"NET/IB": 16, "P2P": 32},
        }
        self.change("collectives", lambda r: r.model_copy(update={"facts": {"transport": transport}}))
        self.change("collectives", self._with_ports)
        self._fill()
        self._fill_variants()

    def change(self, stage: str, change: Callable[[RankRecord], RankRecord], *ranks: int) -> None:
        """Replace the records of a stage, or those of some ranks."""
        if stage not in self.records:
            return
        self.records[stage] = [change(r) if not ranks or r.rank in ranks else r for r in self.records[stage]]

    def figure(
        self, stage: str, name: str, value: float | None, *ranks: int, only: Callable[[Figure], bool] = lambda f: True
    ) -> None:
        """Set a figure of some ranks, or of all."""

        def changed(record: RankRecord) -> RankRecord:
            new = [
                f.model_copy(update={"value": value}) if f.name == name and only(f) else f for f in record.figures
            ]  # fmt: skip
            return record.model_copy(update={"figures": tuple(new)})

        self.change(stage, changed, *ranks)

    def fact(self, stage: str, name: str, value: Any, *ranks: int) -> None:
        """Set a fact of some ranks, or of all."""
        self.change(stage, lambda r: r.model_copy(update={"facts": r.facts | {name: value}}), *ranks)

    @property
    def evidence(self) -> Evidence:
        return Evidence(
            self.check,
            self.outcomes,
            self.records,
            {},
            self.training,
            history=self.history,
            own_versions=self.own_versions,
            variants=self.variants,
            training_of_ranks=self.training_of_ranks,
        )

    def findings(self) -> list[Finding]:
        return judge(self.evidence)

    def bad(self) -> dict[str, Finding]:
        """What does not pass, by stage and gate; of several sizes the first."""
        found: dict[str, Finding] = {}
        for f in self.findings():
            if f.status not in (Status.PASS, Status.SKIP):
                found.setdefault(f"{f.stage}/{f.gate}", f)
        return found

    def _record(self, rank: int, width: int, num_nodes: int) -> RankRecord:
        node = rank // width
        return RankRecord(
            rank=rank,
            world_size=num_nodes * width,
            node=node,
            process=rank % width,
            host=f"host-{node}",
            doing="done",
            step=9,
        )

    def _with_inventory(self, record: RankRecord) -> RankRecord:
        facts: dict[str, Any] = dict(FACTS)
        if record.process == 0:
            is_gpu = self.check.pool.gpus
            facts["gpus"] = [
                GPU | {"uuid": f"GPU-{record.node}-{i}"} for i in range(self.check.pool.processes_per_node)
            ] * is_gpu
            facts["topology"] = [TOPOLOGY] * self.check.pool.processes_per_node * is_gpu
            facts["infiniband"] = [PORT | {"device": f"mlx5_{i}"} for i in range(8)]
            facts["xids"] = []
        return record.model_copy(update={"facts": facts, "figures": (Figure(name="clock_ahead_s", value=0.0),)})

    def _with_ports(self, record: RankRecord) -> RankRecord:
        ports = self.records["inventory"][record.rank].facts.get("infiniband")
        again = {BEFORE: ports, AFTER: ports, WATCHED: 60.0} if record.process == 0 else {}
        return record.model_copy(update={"facts": record.facts | again})

    def _with_gpus_again(self, record: RankRecord) -> RankRecord:
        before = self.records["inventory"][record.rank].facts
        again = {name: before[name] for name in ("gpus", "xids")} if record.process == 0 else {}
        return record.model_copy(update={"facts": again})

    def _fill(self) -> None:
        """Every figure that is expected, at a sound value."""
        references, _ = references_of(self.evidence)
        places = {stage: self.evidence.places_of_ranks(stage) for stage in self.records}
        for stage, name, size, place in expected_figures(self.evidence):
            figure = Figure(name=name, value=self._sound(references, name, size), size_bytes=size)
            if stage == "training":
                # Of the ranks in their order.
                (self.training if place == "all" else self.training_of_ranks).append(figure)
                continue
            ranks = [rank for rank, own in places[stage].items() if place in ("all", own, own.partition("/")[0])]
            add = lambda r, figure=figure: r.model_copy(update={"figures": (*r.figures, figure)})  # noqa: E731
            self.change(stage, add, ranks[0])
        world = self.check.pool.world_size
        for rank in range(world) if "collectives" in self.records else ():
            pairs = tuple(
                Figure(name="pair_gbytes_per_s", value=46.0 if places["collectives"][rank].partition("/")[0] !=
                       places["collectives"][peer].partition("/")[0] else 390.0, size_bytes=1 << 26, peer=str(peer))
                for peer in range(world) if peer != rank
            )  # fmt: skip
            self.change(
                "collectives", lambda r, pairs=pairs: r.model_copy(update={"figures": (*r.figures, *pairs)}), rank
            )

    def _fill_variants(self) -> None:
        """Each variant that this cluster should have, measured as it should be."""
        planned = [v for found in variants_of(self.evidence).values() if not isinstance(found, str) for v in found]
        for variant in planned:
            self.variants[variant.name] = [self._of_variant(r, variant) for r in self.records["collectives"]]
        if planned:
            outcomes = tuple(VariantOutcome(name=v.name, state="done") for v in planned)
            self.outcomes["collectives"] = self.outcomes["collectives"].model_copy(update={"variants": outcomes})

    def _of_variant(self, record: RankRecord, variant: Variant) -> RankRecord:
        adapters = [variant.rail] if variant.rail else record.facts["transport"]["adapters"]
        facts = {"rail": variant.rail, "transport": record.facts["transport"] | {"adapters": adapters}}
        value = 46.0 if variant.rail else 360.0
        figures = tuple(
            Figure(name=f"{variant.prefix}{operation}_busbw_gbytes_per_s", value=value, size_bytes=size)
            for operation in variant.operations for size in variant.sizes_bytes
        )  # fmt: skip
        return record.model_copy(update={"facts": facts, "figures": figures if record.rank == 0 else ()})

    def _sound(self, references: References, name: str, size: int | None) -> float:
        if name in SOUND:
            return SOUND[name]
        is_inside = name.startswith("node_") or self.check.pool.num_nodes == 1
        fabric = references.node_fabric if is_inside else references.cluster_fabric
        fabric = fabric or fabric_of("nvlink4")
        reached = fabric.all_reduce_gbytes_per_s(size, 8) if size is not None and fabric is not None else None
        return reached or 1.0
