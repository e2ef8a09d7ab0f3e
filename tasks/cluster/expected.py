"""What a check must have measured: every figure that is not there fails."""

from collections.abc import Callable, Iterator

from tasks.cluster.evidence import NOT_RUN, SHARED_IS_FULL, Evidence
from tasks.cluster.variants import expected_of_variants
from tasks.contracts.cluster_settings import ClusterCheck

Expected = tuple[str, int | None, str]
"""A figure's name, its size in bytes or None, and its place."""


def expected_figures(evidence: Evidence) -> list[tuple[str, str, int | None, str]]:
    """Every figure that must be there: ``(stage, name, size, place)``; those of stages that did not run are not."""
    found = [
        (stage, *figure)
        for stage, outcome in evidence.outcomes.items()
        if outcome.state not in NOT_RUN and stage in OF_STAGE
        for figure in OF_STAGE[stage](evidence, list(evidence.places_of_ranks(stage).values()))
    ]
    return found + expected_of_variants(evidence)


def why_no_share(check: ClusterCheck) -> str | None:
    """Why training is not held against the product rate of its devices, where it is not."""
    if not check.pool.gpus:
        return "training on processors is held against no product rate (pool.gpus is off)"
    return None if "devices" in check.stages else "no product rate was measured: devices is not among the stages"


def compares_ranks(check: ClusterCheck) -> bool:
    """Whether ranks' own work in training is compared: GPUs time it themselves, processors are shared with others."""
    return check.pool.gpus and check.pool.world_size > 1


def _of_devices(evidence: Evidence, places: list[str]) -> Iterator[Expected]:
    names = ["memory_copy_gbytes_per_s", "memory_pattern_wrong_bytes", "matrix_product_float32_tflops_per_s"]
    if evidence.check.pool.gpus:
        names += ["matrix_product_bfloat16_tflops_per_s", "host_to_device_gbytes_per_s", "device_to_host_gbytes_per_s",
                  "throttled_share"]  # fmt: skip
        # Not every chip has it, but all chips of a cluster or none.
        fp8 = "matrix_product_float8_tflops_per_s"
        seen = {figure.name for record in evidence.records.get("devices", ()) for figure in record.figures}
        names += [fp8] * (fp8 in seen)
    else:
        names.append("step_s")
    return ((name, None, place) for name in names for place in places)


def _of_endurance(evidence: Evidence, places: list[str]) -> Iterator[Expected]:
    names = ["endurance_product_tflops_per_s", "endurance_slowdown_share"]
    names += ["endurance_throttled_share"] * evidence.check.pool.gpus
    return ((name, None, place) for name in names for place in places)


def _of_collectives(evidence: Evidence, places: list[str]) -> Iterator[Expected]:
    pool, collectives = evidence.check.pool, evidence.check.collectives
    # One rank alone moves nothing.
    for size in collectives.sizes_bytes() if pool.world_size > 1 else ():
        for operation in collectives.operations:
            yield f"{operation}_busbw_gbytes_per_s", size, "all"
            if pool.num_nodes > 1 and pool.processes_per_node > 1:
                yield from ((f"node_{operation}_busbw_gbytes_per_s", size, node) for node in _nodes(places))
        if "all_reduce" in collectives.operations:
            yield from (("lateness_s", size, place) for place in places)


def _of_storage(evidence: Evidence, places: list[str]) -> Iterator[Expected]:
    full = {
        evidence.node_of(record)
        for record in evidence.records.get("storage", ())
        for problem in record.problems
        if problem.gate == SHARED_IS_FULL
    }
    for root in ("shared", "scratch"):
        for what in ("write_gbytes_per_s", "read_gbytes_per_s", "small_file_create_ms", "small_file_read_ms"):
            # What a full filesystem kept from being measured is missing for no fault of the node's.
            yield from ((f"{root}_{what}", None, n) for n in _nodes(places) if root != "shared" or n not in full)


def _of_training(evidence: Evidence, places: list[str]) -> Iterator[Expected]:
    names = ["training_tokens_per_s_per_gpu", "training_first_loss_difference", "training_loss_difference"]
    names += ["training_share_of_product_rate"] * (why_no_share(evidence.check) is None)
    pool = evidence.check.pool
    names += ["training_scaling_efficiency"] * (pool.world_size > 1)
    yield from ((name, None, "all") for name in names)
    if compares_ranks(evidence.check):
        yield from (("training_work_us_per_token", None, place) for place in places)


def _nodes(places: list[str]) -> list[str]:
    return sorted({place.partition("/")[0] for place in places})


OF_STAGE: dict[str, Callable[[Evidence, list[str]], Iterator[Expected]]] = {
    "devices": _of_devices,
    "endurance": _of_endurance,
    "collectives": _of_collectives,
    "storage": _of_storage,
    "training": _of_training,
}
