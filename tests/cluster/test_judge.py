"""A sound cluster passes; what misses a limit, its fleet or its history is a FAIL; what is not known is never a PASS."""

import pytest
from pydantic import ValidationError

from tasks.cluster.evidence import history_key
from tasks.cluster.judge import references_of, status_of
from tasks.contracts.cluster_report import Figure, Status
from tasks.contracts.cluster_settings import ClusterCheck
from tasks.contracts.deployments import deployment_values
from tasks.hardware.reference import chip_of
from tests.cluster.clusters import GPU, Cluster


def test_a_sound_cluster_of_two_nodes_passes_every_gate():
    cluster = Cluster()
    assert cluster.bad() == {}
    assert status_of(cluster.findings()) is Status.PASS
    assert len(cluster.findings()) > 60


def test_the_references_own_limits_are_a_profile_that_a_cluster_can_miss():
    thresholds = {"profile": "reference", "floor_share": 0.8}
    cluster = Cluster(thresholds=thresholds, collectives={"size_factor": 1024, "min_kib": 1024})
    # Above the physical floor and below the 350 GB/s of the reference.
    cluster.figure("collectives", "all_reduce_busbw_gbytes_per_s", 349.0, only=lambda f: f.size_bytes == 1 << 30)
    finding = cluster.bad()["collectives/all_reduce_busbw_gbytes_per_s"]
    assert (finding.limit, finding.layer, finding.status) == (350.0, "limit", Status.FAIL)


def test_the_references_own_limits_take_the_place_of_no_stricter_ones():
    thresholds = {"profile": "reference", "min_scaling_efficiency": 0.99}
    cluster = Cluster(thresholds=thresholds, collectives={"size_factor": 1024, "min_kib": 1024})
    limits = {(f.gate, f.size_bytes): f.limit for f in cluster.findings()}
    assert limits["training_scaling_efficiency", None] == 0.99
    assert limits["all_reduce_busbw_gbytes_per_s", 1 << 30] == pytest.approx(0.85 * 414)
    assert limits["training_tokens_per_s_per_gpu", None] == 500.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "-inf"])
def test_a_limit_that_is_no_finite_number_is_refused(value):
    with pytest.raises(ValidationError, match=r"overrides.step_s\n.*finite number"):
        ClusterCheck(thresholds={"overrides": {"step_s": value}})


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_figure_that_is_no_number_fails_and_names_its_gpu(value):
    cluster = Cluster()
    cluster.figure("devices", "memory_copy_gbytes_per_s", value, 11)
    finding = cluster.bad()["devices/memory_copy_gbytes_per_s"]
    assert (finding.status, finding.layer, finding.culprits) == (Status.FAIL, "presence", ("host-1/gpu3",))


def test_a_figure_that_is_missing_fails_and_is_no_pass():
    cluster = Cluster()
    keep = lambda r: r.model_copy(update={"figures": tuple(f for f in r.figures if not f.name.startswith("matrix"))})  # noqa: E731
    cluster.change("devices", keep, 5)
    finding = cluster.bad()["devices/matrix_product_bfloat16_tflops_per_s"]
    assert (finding.status, finding.culprits) == (Status.FAIL, ("host-0/gpu5",))


def test_a_size_that_was_not_measured_fails_by_itself():
    cluster = Cluster()
    drop = lambda r: r.model_copy(update={"figures": tuple(f for f in r.figures if f.size_bytes != 65536)})  # noqa: E731
    cluster.change("collectives", drop)
    failed = [f for f in cluster.findings() if f.status is Status.FAIL]
    assert {f.size_bytes for f in failed} == {65536}


def test_one_slow_gpu_among_sixteen_is_an_outlier_although_it_is_above_the_floor():
    cluster = Cluster()
    cluster.figure("devices", "matrix_product_bfloat16_tflops_per_s", 660.0, 9)
    finding = cluster.bad()["devices/matrix_product_bfloat16_tflops_per_s"]
    assert (finding.layer, finding.culprits) == ("fleet", ("host-1/gpu1",))


def test_filesystems_may_differ_by_more_than_gpus_and_not_without_end():
    cluster = Cluster()
    cluster.figure("storage", "shared_write_gbytes_per_s", 0.7, 8)
    assert cluster.bad() == {}
    cluster.figure("storage", "shared_write_gbytes_per_s", 0.3, 8)
    assert cluster.bad()["storage/shared_write_gbytes_per_s"].culprits == ("host-1",)


def test_a_fleet_that_is_slow_as_a_whole_misses_the_floor():
    cluster = Cluster()
    cluster.figure("devices", "matrix_product_bfloat16_tflops_per_s", 400.0)
    finding = cluster.bad()["devices/matrix_product_bfloat16_tflops_per_s"]
    assert (finding.layer, len(finding.culprits)) == ("floor", 16)
    assert finding.limit == pytest.approx(0.85 * chip_of("H100").figures[finding.gate])


def test_a_limit_that_no_measurement_can_miss_is_itself_a_failure():
    cluster = Cluster(thresholds={"overrides": {"all_reduce_busbw_gbytes_per_s@1000000": 1, "no_such_gate": 2}})
    assert sorted(cluster.bad()) == [
        "inventory/limit all_reduce_busbw_gbytes_per_s@1000000",
        "inventory/limit no_such_gate",
    ]
    # The sizes of this cluster's settings are not those that the reference's limits are for.
    assert (
        "inventory/limit all_reduce_busbw_gbytes_per_s@1073741824" in Cluster(thresholds={"profile": "reference"}).bad()
    )


def test_the_deployments_measure_what_their_limits_are_for():
    for name in ("demo", "nightly", "acceptance"):
        check = ClusterCheck(**deployment_values(name, "cluster-check", "check"))
        assert check.stages[0] == "inventory"
        if check.thresholds.profile == "reference":
            assert 1 << 30 in check.collectives.sizes_bytes()


def test_an_override_takes_the_place_of_the_floor_at_its_size_alone():
    cluster = Cluster(thresholds={"overrides": {"all_reduce_busbw_gbytes_per_s@268435456": 500}})
    bad = [f for f in cluster.findings() if f.status is Status.FAIL]
    assert [(f.gate, f.size_bytes, f.limit) for f in bad] == [("all_reduce_busbw_gbytes_per_s", 268435456, 500)]


def test_drift_from_its_own_history_warns_and_far_drift_fails():
    key = "training/training_tokens_per_s_per_gpu/all"
    for value, status in ((10_000.0, Status.WARN), (6_000.0, Status.FAIL), (11_900.0, Status.PASS)):
        cluster = Cluster()
        cluster.training = [
            f.model_copy(update={"value": value}) if f.name == "training_tokens_per_s_per_gpu" else f
            for f in cluster.training
        ]
        cluster.history = {key: [12_000.0, 12_010.0, 11_990.0, 12_020.0, 12_000.0]}
        finding = next(f for f in cluster.findings() if f.gate == "training_tokens_per_s_per_gpu")
        assert (finding.status, finding.layer) == (status, "history"), value


def test_too_short_a_history_decides_nothing():
    cluster = Cluster()
    cluster.history = {"training/training_tokens_per_s_per_gpu/all": [90_000.0] * 4}
    assert cluster.bad() == {}


def test_an_unknown_chip_is_judged_by_its_fleet_and_says_so():
    cluster = Cluster()
    cluster.fact("inventory", "gpus", [GPU | {"name": "Wonder 9000"}] * 8, 0, 8)
    _, notes = references_of(cluster.evidence)
    assert "'Wonder 9000' is not in tasks/hardware/reference.yaml" in notes[0]
    assert cluster.bad() == {}
    cluster.figure("devices", "memory_copy_gbytes_per_s", 2000.0, 3)
    assert cluster.bad()["devices/memory_copy_gbytes_per_s"].culprits == ("host-0/gpu3",)


def test_one_gpu_of_an_unknown_chip_is_no_pass_where_nothing_tells_what_is_good():
    cluster = Cluster(1, 1, stages=("inventory", "devices"))
    cluster.fact("inventory", "gpus", [GPU | {"name": "Wonder 9000"}])
    assert cluster.bad()["devices/memory_copy_gbytes_per_s"].status is Status.WARN


def test_throttling_fails_although_the_figure_is_good_enough():
    cluster = Cluster()
    cluster.figure("devices", "throttled_share", 0.4, 6)
    assert cluster.bad()["devices/throttled_share"].culprits == ("host-0/gpu6",)


def test_equal_runs_on_gpus_begin_equal_and_may_round_apart_later():
    cluster = Cluster(1, 2)
    cluster.training = [f.model_copy(update={"value": 2.2e-4}) if f.name == "training_loss_difference" else f
                        for f in cluster.training]  # fmt: skip
    assert not cluster.bad()
    cluster.training = [f.model_copy(update={"value": 2.2e-4}) if f.name == "training_first_loss_difference" else f
                        for f in cluster.training]  # fmt: skip
    finding = cluster.bad()["training/training_first_loss_difference"]
    assert (finding.status, finding.culprits) == (Status.FAIL, ("the node",))
    on_processors = Cluster(1, 2, gpus=False)
    on_processors.training = [f.model_copy(update={"value": 2.2e-4}) if f.name == "training_loss_difference" else f
                              for f in on_processors.training]  # fmt: skip
    assert "training/training_loss_difference" in on_processors.bad()


ENDURANCE = ("inventory", "devices", "endurance")


def test_a_fleet_that_throttles_or_slows_down_under_sustained_load_fails():
    assert Cluster(stages=ENDURANCE, soak_minutes=10).bad() == {}
    for name, value in (
        ("endurance_throttled_share", 0.9),
        ("endurance_slowdown_share", 0.45),
        ("endurance_product_tflops_per_s", 400.0),
    ):
        cluster = Cluster(stages=ENDURANCE, soak_minutes=10)
        cluster.figure("endurance", name, value)
        finding = cluster.bad()[f"endurance/{name}"]
        assert (finding.status, len(finding.culprits)) == (Status.FAIL, 16)


def test_small_differences_below_a_limit_are_neither_outliers_nor_drift():
    cluster = Cluster(2, 1, stages=ENDURANCE, soak_minutes=10)
    cluster.figure("endurance", "endurance_slowdown_share", 0.0, 0)
    cluster.figure("endurance", "endurance_slowdown_share", 0.003, 1)
    assert cluster.bad() == {}
    cluster = Cluster()
    cluster.figure("collectives", "lateness_s", 0.00004)
    cluster.training = [
        f.model_copy(update={"value": 2e-6}) if f.name == "training_loss_difference" else f for f in cluster.training
    ]
    late = {history_key(p): [0.00002] * 6 for p in cluster.evidence.placed() if p.figure.name == "lateness_s"}
    cluster.history = {**late, "training/training_loss_difference/all": [0.0] * 6}
    assert cluster.bad() == {}


def test_one_rank_alone_is_held_against_no_fabric():
    cluster = Cluster(1, 1, stages=("inventory", "devices", "collectives"))
    gates = {f.gate for f in cluster.findings()}
    assert not [gate for gate in gates if "busbw" in gate or gate.startswith("pair")]


def test_cards_with_other_memory_or_power_are_not_held_against_the_sxm_ones():
    assert chip_of("NVIDIA H100 80GB HBM3").name == "H100"
    assert chip_of("NVIDIA A100-SXM4-80GB").name == "A100"
    for name in ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB", "NVIDIA H100 PCIe", "NVIDIA H100 NVL"):
        assert chip_of(name) is None


def pairs_of(cluster: Cluster, speed: float) -> None:
    cluster.figure("collectives", "pair_gbytes_per_s", speed)


def test_pairs_inside_a_node_have_a_floor_and_a_limit_of_their_own():
    cluster = Cluster(num_nodes=1)
    pairs_of(cluster, 390.0)
    assert cluster.bad() == {}
    pairs_of(cluster, 200.0)
    assert cluster.bad()["collectives/pairs"].layer == "floor"
    limited = Cluster(num_nodes=1, thresholds={"overrides": {"pair_gbytes_per_s": 1000}})
    pairs_of(limited, 390.0)
    finding = limited.bad()["collectives/pairs"]
    assert (finding.limit, finding.layer) == (1000.0, "limit")
    # A limit of 0 is one that nothing misses, and no missing limit.
    unlimited = Cluster(num_nodes=1, thresholds={"overrides": {"pair_gbytes_per_s": 0}})
    pairs_of(unlimited, 5.0)
    assert unlimited.bad() == {}


def test_routes_that_were_not_measured_fail():
    cluster = Cluster(num_nodes=1, width=4)

    def without(record):
        return record.model_copy(update={"figures": tuple(f for f in record.figures if f.name != "pair_gbytes_per_s")})

    cluster.change("collectives", without, 2)
    finding = cluster.bad()["collectives/pairs"]
    assert (finding.status, finding.layer) == (Status.FAIL, "presence")
    assert "3 of 12 routes" in finding.detail


def test_training_that_makes_little_of_the_products_fails():
    cluster = Cluster()
    name = "training_share_of_product_rate"
    others = [figure for figure in cluster.training if figure.name != name]
    cluster.training = [*others, Figure(name=name, value=0.05)]
    assert cluster.bad()[f"training/{name}"].limit == cluster.check.thresholds.min_share_of_product_rate
    # Points without useful work, or devices without a product, must not do away with the gate.
    cluster.training = others
    assert cluster.bad()[f"training/{name}"].layer == "presence"


@pytest.mark.parametrize(
    ("check", "why"),
    [({"gpus": False}, "pool.gpus is off"), ({"stages": ("inventory", "training")}, "devices is not among the stages")],
)
def test_training_that_is_held_against_no_product_rate_says_why(check, why):
    (finding,) = [f for f in Cluster(**check).findings() if f.gate == "training_share_of_product_rate"]
    assert finding.status is Status.SKIP
    assert why in finding.detail


def test_an_ethernet_port_beside_infiniband_does_not_lower_the_floors():
    cluster = Cluster()
    ports = cluster.records["inventory"][0].facts["infiniband"]
    ethernet = ports[0] | {"device": "mlx5_8", "link_layer": "Ethernet", "rate_gbits_per_s": 100.0}
    cluster.fact("inventory", "infiniband", [*ports, ethernet], 0, 8)
    references, _ = references_of(cluster.evidence)
    assert references.cluster_fabric.name == "infiniband_ndr"
    cluster.fact("inventory", "infiniband", [p | {"link_layer": "Ethernet"} for p in ports], 0, 8)
    assert references_of(cluster.evidence)[0].cluster_fabric.name == "roce"


def test_too_few_adapters_on_all_nodes_alike_are_seen():
    cluster = Cluster()
    few = {"network": "IB", "adapters": ["mlx5_0"], "channels": {"NET/IB": 2}}
    cluster.fact("collectives", "transport", few)
    assert cluster.bad()["collectives/transport"].culprits == ("host-0", "host-1")


def test_a_job_of_one_gpu_a_node_is_held_to_one_adapter():
    cluster = Cluster(width=1, collectives={"size_factor": 1024, "min_kib": 1024})
    cluster.figure("collectives", "all_reduce_busbw_gbytes_per_s", 45.0, only=lambda f: f.size_bytes == 1 << 30)
    assert "collectives/all_reduce_busbw_gbytes_per_s" not in cluster.bad()


def test_a_check_of_processors_on_a_machine_with_gpus_is_held_to_no_gpus_floor():
    cluster = Cluster(gpus=False)
    cluster.fact("inventory", "gpus", [GPU])
    references, _ = references_of(cluster.evidence)
    assert references.chip is None or references.chip.name == "CPU"


def test_memory_that_is_missing_and_fp8_that_one_chip_does_not_have_are_seen():
    cluster = Cluster()
    for rank in (0, 8):
        cluster.change(
            "inventory",
            lambda r: r.model_copy(
                update={"figures": (*r.figures, Figure(name="memory_total_gbytes", value=2000.0 if r.node else 250.0))}
            ),
            rank,
        )
    assert cluster.bad()["inventory/memory_total_gbytes"].culprits == ("host-0",)
    fp8 = Figure(name="matrix_product_float8_tflops_per_s", value=1400.0)
    cluster = Cluster()
    cluster.change("devices", lambda r: r.model_copy(update={"figures": (*r.figures, fp8)}), *range(15))
    assert cluster.bad()["devices/matrix_product_float8_tflops_per_s"].culprits == ("host-1/gpu7",)


def test_limits_are_named_by_figures_and_not_by_other_gates():
    cluster = Cluster(thresholds={"overrides": {"clock_skew": 5, "finished": 1}})
    assert {"inventory/limit clock_skew", "inventory/limit finished"} <= cluster.bad().keys()
