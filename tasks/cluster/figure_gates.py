"""A gate for every figure at every size: is it there, is it a number, and do floor, fleet and history agree with it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tasks.cluster.evidence import Evidence, history_key
from tasks.cluster.layers import Better, better_of, drift, is_number, misses, outliers
from tasks.contracts.cluster_report import Finding, Layer, Placed, Status
from tasks.contracts.cluster_settings import ThresholdSettings
from tasks.hardware.reference import Chip, Fabric

ONLY_SHOWN = ("_algbw_gbytes_per_s", "memory_pattern_tested_gbytes", "power_watts",
              "temperature_celsius", "sm_clock_mhz", "training_final_loss", "load_per_processor",
              "clock_ahead_s", "pair_gbytes_per_s")  # fmt: skip
"""Figures that have no gate here: they are context, or a gate of their own elsewhere looks at them."""
GROUP_TIMES = ("all_reduce_s", "all_gather_s", "reduce_scatter_s", "all_to_all_s", "broadcast_s", "send_recv_s")
"""Gated as bandwidths."""
HAVE_LIMITS_ALONE = ("lateness_s", "memory_pattern_wrong_bytes", "throttled_share", "endurance_throttled_share",
                     "endurance_slowdown_share", "training_first_loss_difference", "training_loss_difference")  # fmt: skip
"""Below their limits differences do not matter, whatever share of each other they are."""
MAX_LOSS_DIFFERENCE_NATS = 1e-4
"""Between equal runs on processors, and in the first step on GPUs, which is a forward pass alone."""
MAX_LATER_LOSS_DIFFERENCE_ON_GPUS_NATS = 2e-3
"""Attention's backward pass adds up in whatever order its blocks end: ten times the 2.2e-4 by which two runs on two sound H100s
differed after ten steps of lora-1b."""
LATE = "look for what holds this process up: other processes, interrupts, a slow GPU; then measure again"
FABRIC = "the fabric "
"""How a culprit begins that is no place."""
LIMITS_OF_REFERENCE = {
    "all_reduce_busbw_gbytes_per_s@1073741824": 350.0,
    "training_tokens_per_s_per_gpu": 500.0,
    "training_scaling_efficiency": 0.9,
}
"""Of the acceptance suite that this one replaces."""
NOTHING_TO_HOLD_IT_AGAINST = "measured; no floor, fleet or history to hold it against"
NEEDS_REFERENCE = ("matrix_product_", "memory_copy_", "all_reduce_busbw")
"""Of these something must tell what is good: floor, fleet or history."""


@dataclass(frozen=True)
class References:
    """What the cluster's chip and fabrics can do; None where they are not known."""

    chip: Chip | None
    node_fabric: Fabric | None
    cluster_fabric: Fabric | None


def figure_findings(
    evidence: Evidence, references: References, expected: Sequence[tuple[str, str, int | None, str]]
) -> list[Finding]:
    """One finding per figure and size, the worst layer deciding.

    Args:
        expected: ``(stage, name, size, place)`` of every figure that must be there.
    """
    groups: dict[tuple[str, str, int | None], dict[str, Placed]] = defaultdict(dict)
    wanted: dict[tuple[str, str, int | None], set[str]] = defaultdict(set)
    for stage, name, size, place in expected:
        wanted[stage, name, size].add(place)
    for placed in evidence.placed():
        figure = placed.figure
        if not figure.name.endswith(ONLY_SHOWN) and not figure.name.endswith(GROUP_TIMES):
            groups[placed.stage, figure.name, figure.size_bytes][placed.place] = placed
    findings = []
    for key in sorted(groups.keys() | wanted.keys(), key=lambda k: (k[0], k[1], k[2] or 0)):
        findings.append(_judge(evidence, references, key, groups.get(key, {}), wanted.get(key, set())))
    return findings


def _judge(
    evidence: Evidence,
    references: References,
    key: tuple[str, str, int | None],
    found: Mapping[str, Placed],
    wanted: set[str],
) -> Finding:
    stage, name, size = key
    outcome = evidence.outcomes.get(stage)

    def finding(status: Status, layer: Layer, detail: str, **more: object) -> Finding:
        values = {"stage": stage, "gate": name, "size_bytes": size, "status": status, "layer": layer, "detail": detail}
        return Finding.model_validate(values | more)

    if outcome is not None and outcome.state in ("skipped", "yielded"):
        return finding(Status.SKIP, "presence", outcome.error)
    missing = sorted(wanted - found.keys())
    broken = sorted(place for place, placed in found.items() if not is_number(placed.figure.value))
    if missing or broken:
        parts = [f"no figure from {', '.join(missing)}"] * bool(missing)
        parts += [f"not a number on {', '.join(broken)}"] * bool(broken)
        # A stage that ended early has a finding of its own that names who ended it.
        ended = outcome is not None and outcome.state == "failed"
        return finding(
            Status.FAIL, "presence", "; ".join(parts), culprits=tuple(broken if ended else missing + broken),
            action="" if ended else "read this process's log for what kept it from measuring",
        )  # fmt: skip
    better = better_of(name)
    values = {place: float(placed.figure.value) for place, placed in found.items() if placed.figure.value is not None}
    ordered = sorted(values, key=lambda place: values[place], reverse=better == "lower")
    worst = values[ordered[0]]
    thresholds = _thresholds_of(evidence, stage)
    limit, layer, why = _limit(evidence, references, name, size)
    if limit is not None:
        below = [place for place in ordered if misses(values[place], limit, better)]
        if below:
            status = Status.FAIL
            sign = "below" if better == "higher" else "above"
            return finding(
                status, layer, f"{worst:.4g} on {ordered[0]} is {sign} {limit:.4g} ({why})", value=worst, limit=limit,
                culprits=tuple(_named(place, stage, evidence.check.pool.num_nodes) for place in below),
                action=_action(evidence, references, name),
            )  # fmt: skip
    off = outliers(values, better, thresholds)
    if off and name not in HAVE_LIMITS_ALONE:
        first = off[0]
        return finding(
            Status.FAIL, "fleet",
            f"{first.value:.4g} on {first.place} is {first.worse_by:.0%} worse than {first.typical:.4g} of the others",
            value=first.value, limit=first.typical, culprits=tuple(o.place for o in off),
            action=_action(evidence, references, name),
        )  # fmt: skip
    drifted = _drifted(evidence, found, better, thresholds)
    if drifted and name not in HAVE_LIMITS_ALONE:
        place, effect = drifted[0]
        status = Status.FAIL if effect > min(0.95, 2 * thresholds.history_effect) else Status.WARN
        return finding(
            status, "history", f"{values[place]:.4g} on {place} is {effect:.0%} worse than in earlier runs",
            value=values[place], culprits=tuple(p for p, _ in drifted), action=_action(evidence, references, name),
        )  # fmt: skip
    has_fleet = len(values) > 1 and name not in HAVE_LIMITS_ALONE
    has_history = name not in HAVE_LIMITS_ALONE and any(
        len(evidence.history.get(history_key(p), ())) >= thresholds.min_history for p in found.values()
    )
    if (
        limit is None
        and not has_fleet
        and not has_history
        and name.startswith(NEEDS_REFERENCE)
        and _reference_of(evidence, references, name) is None
    ):
        return finding(
            Status.WARN, "presence", "measured, and nothing to hold it against: its reference is not known, there is one of it, "
            "and no history", value=worst, action="set chip and fabric, or thresholds.overrides",
        )  # fmt: skip
    held = [why] * (limit is not None) + ["the fleet"] * has_fleet + ["its history"] * has_history
    return finding(
        Status.PASS, layer if limit is not None else "fleet" if has_fleet else "history" if has_history else "presence",
        f"held against {', '.join(held)}" if held else NOTHING_TO_HOLD_IT_AGAINST,
        value=worst, limit=limit,
    )  # fmt: skip


def _limit(evidence: Evidence, references: References, name: str, size: int | None) -> tuple[float | None, Layer, str]:
    """The limit of a figure, the layer it belongs to, and where it comes from."""
    thresholds = evidence.check.thresholds
    key = f"{name}@{size}" if size is not None else name
    for sought in (key, name):
        if sought in thresholds.overrides:
            return thresholds.overrides[sought], "limit", f"thresholds.overrides {sought}"
    limit, layer, why = _usual_limit(evidence, references, name, size)
    own = LIMITS_OF_REFERENCE.get(key) if thresholds.profile == "reference" else None
    if own is not None and (limit is None or misses(limit, own, better_of(name))):
        return own, "limit", "the reference's own"
    # What the settings or the fabric ask for may be more than the reference did.
    return limit, layer, why


def _usual_limit(
    evidence: Evidence, references: References, name: str, size: int | None
) -> tuple[float | None, Layer, str]:
    """The same without overrides and profile."""
    thresholds = evidence.check.thresholds
    if name == "lateness_s":
        return thresholds.max_lateness_ms / 1e3, "limit", "thresholds.max_lateness_ms"
    if name == "training_share_of_product_rate":
        return thresholds.min_share_of_product_rate, "limit", "thresholds.min_share_of_product_rate"
    if name == "training_scaling_efficiency":
        return thresholds.min_scaling_efficiency, "limit", "thresholds.min_scaling_efficiency"
    if name in ("memory_pattern_wrong_bytes", "throttled_share", "endurance_throttled_share"):
        return 0.0, "limit", "none is allowed"
    if name == "endurance_slowdown_share":
        return thresholds.max_slowdown_share, "limit", "thresholds.max_slowdown_share"
    if name in ("training_first_loss_difference", "training_loss_difference"):
        is_later = evidence.check.pool.gpus and name == "training_loss_difference"
        limit = MAX_LATER_LOSS_DIFFERENCE_ON_GPUS_NATS if is_later else MAX_LOSS_DIFFERENCE_NATS
        return limit, "limit", "two equal runs have equal losses"
    share = thresholds.floor_share
    if name == "endurance_product_tflops_per_s":
        precision = "bfloat16" if evidence.check.pool.gpus else "float32"
        name = f"matrix_product_{precision}_tflops_per_s"
    if references.chip is not None and name in references.chip.figures:
        return share * references.chip.figures[name], "floor", f"{share:.0%} of what {references.chip.name} reaches"
    fabric = _fabric_of(evidence, references, name)
    if name.removeprefix("node_") == "all_reduce_busbw_gbytes_per_s" and fabric is not None and size is not None:
        pool = evidence.check.pool
        num_ranks = pool.processes_per_node if name.startswith("node_") else pool.world_size
        reached = fabric.all_reduce_gbytes_per_s(size, num_ranks)
        if reached is not None and not name.startswith("node_") and fabric.adapters is not None:
            # A GPU sends through an adapter of its own: fewer of them a node reach less.
            of_adapters = min(1.0, pool.processes_per_node / fabric.adapters)
            return share * of_adapters * reached, "floor", f"{share * of_adapters:.0%} of {fabric.title}"
        if reached is not None:
            return share * reached, "floor", f"{share:.0%} of {fabric.title}"
    return None, "presence", ""


def _fabric_of(evidence: Evidence, references: References, name: str) -> Fabric | None:
    is_across = evidence.check.pool.num_nodes > 1 and not name.startswith("node_")
    return references.cluster_fabric if is_across else references.node_fabric


def _reference_of(evidence: Evidence, references: References, name: str) -> Chip | Fabric | None:
    """Whose figure it is: the fabric's or the chip's; None where that is not known."""
    return _fabric_of(evidence, references, name) if "all_reduce" in name else references.chip


def _thresholds_of(evidence: Evidence, stage: str) -> ThresholdSettings:
    """A stage's own: of filesystems, which others use as well, differences matter from `storage_effect` on."""
    thresholds = evidence.check.thresholds
    if stage != "storage":
        return thresholds
    least = thresholds.storage_effect
    effects = {name: max(least, getattr(thresholds, name)) for name in ("fleet_effect", "history_effect")}
    return thresholds.model_copy(update=effects)


def _drifted(
    evidence: Evidence, found: Mapping[str, Placed], better: Better, thresholds: ThresholdSettings
) -> list[tuple[str, float]]:
    effects = {
        place: drift(
            float(placed.figure.value or 0.0), evidence.history.get(history_key(placed), ()), better, thresholds
        )
        for place, placed in found.items()
    }
    return sorted(((p, e) for p, e in effects.items() if e is not None), key=lambda item: -item[1])


def _named(place: str, stage: str, num_nodes: int) -> str:
    """Who is to blame for a figure of all ranks together: of collectives what lies between them."""
    if place != "all":
        return place
    if stage != "collectives":
        return "all nodes" if num_nodes > 1 else "the node"
    return f"{FABRIC}{'between the nodes' if num_nodes > 1 else 'inside the node'}"


def _action(evidence: Evidence, references: References, name: str) -> str:
    if name.endswith("throttled_share"):
        return "look at its cooling, power supply and power limit: nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER"
    if name.startswith(("matrix_product", "step_s", "endurance")):
        return "look at its clocks, power limit and temperature; if they are like the others', replace the GPU"
    if name == "memory_total_gbytes":
        return "see dmidecode and the kernel's log for memory that is missing, and the job's cgroup"
    if name.startswith("memory_"):
        return "run the vendor's memory diagnosis; replace the GPU if it repeats"
    if name.startswith(("host_to", "device_to")):
        return "check PCIe width and generation, NUMA placement and the riser"
    if name.startswith(("shared_", "scratch_")):
        return "look at this node's mount options, network to the storage, and other load on it"
    if name.startswith("lateness"):
        return LATE
    if name.startswith("rail_"):
        return "see this rail's adapters, cables and switch on every node (ibstat, ibdiagnet); the pair matrix may tell which"
    if name.endswith("loss_difference"):
        return "look at the devices' gates: a difference between two equal runs is a corrupted product or collective"
    if name == "training_work_us_per_token":
        return "its own part of a step takes longer than the others': see its devices' gates, clocks, and what else runs there"
    if name.startswith("training"):
        return "read the gates before it: training is slow of what they measure, or of its own settings"
    if evidence.check.pool.num_nodes > 1 and not name.startswith("node_"):
        return "read the pair matrix and NCCL's transport; check cables, adapters and NCCL_IB_HCA"
    if not evidence.check.pool.gpus:
        return "read the pair matrix; see what else the processors of this machine do"
    if references.node_fabric is not None and references.node_fabric.name.startswith("nvlink"):
        return (
            "read the pair matrix; check nvidia-smi nvlink --status, the fabric manager, and whether NVLink multicast is meant "
            "to be off (NCCL_NVLS_ENABLE)"
        )
    return "read the pair matrix; check PCIe width and generation, nvidia-smi topo -m, and that GPUs may reach each other (IOMMU)"
