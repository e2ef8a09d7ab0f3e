"""Each fault names who is to blame, and nobody else; a stage that did not end well says how far it came."""

import pytest

from tasks.cluster.judge import status_of, suspects_of
from tasks.contracts.cluster_report import Figure, Problem, StageOutcome, Status
from tests.cluster.clusters import Cluster


@pytest.mark.parametrize(
    ("num_nodes", "settings", "said", "not_said"),
    [
        (2, {}, "cables, adapters and NCCL_IB_HCA", "nvlink"),
        (1, {}, "nvidia-smi nvlink --status", "NCCL_IB_HCA"),
        (1, {"node_fabric": "pcie"}, "PCIe width", "nvlink"),
        (1, {"gpus": False}, "the processors of this machine", "nvidia-smi"),
    ],
)
def test_a_slow_collective_is_looked_for_in_the_fabric_that_it_ran_over(num_nodes, settings, said, not_said):
    limits = {"overrides": {f"all_reduce_busbw_gbytes_per_s@{1 << 30}": 9}}
    cluster = Cluster(num_nodes, collectives={"size_factor": 1024, "min_kib": 1024}, thresholds=limits, **settings)
    cluster.figure("collectives", "all_reduce_busbw_gbytes_per_s", 1.0, only=lambda f: f.size_bytes == 1 << 30)
    action = cluster.bad()["collectives/all_reduce_busbw_gbytes_per_s"].action
    assert said in action
    assert not_said not in action


def test_a_rank_that_takes_longer_for_its_own_part_of_training_is_named():
    cluster = Cluster()
    ninth = cluster.training_of_ranks[9]
    cluster.training_of_ranks[9] = ninth.model_copy(update={"value": 80.0})
    finding = cluster.bad()["training/training_work_us_per_token"]
    assert (finding.status, finding.layer, finding.culprits) == (Status.FAIL, "fleet", ("node1/gpu1",))
    cluster.training_of_ranks[9] = ninth.model_copy(update={"value": None})
    finding = cluster.bad()["training/training_work_us_per_token"]
    assert (finding.layer, finding.culprits) == ("presence", ("node1/gpu1",))
    # Processors are shared with others, and one rank alone has nobody to be compared with.
    for other in (Cluster(gpus=False), Cluster(1, 1)):
        assert not [f for f in other.findings() if f.gate == "training_work_us_per_token"]


def test_a_wrong_sum_names_who_saw_it():
    cluster = Cluster()
    problem = Problem(gate="all_reduce_correct", error="1 of 256 elements are wrong")
    cluster.change("collectives", lambda r: r.model_copy(update={"problems": (problem,)}), 12)
    finding = cluster.bad()["collectives/all_reduce_correct"]
    assert (finding.layer, finding.culprits) == ("correctness", ("host-1/gpu4",))


def test_other_bits_of_the_same_step_name_the_device():
    cluster = Cluster()
    cluster.fact("devices", "step_sha256", "other", 2)
    assert cluster.bad()["devices/step_equal_on_all"].culprits == ("host-0/gpu2",)


def test_a_rank_that_comes_late_is_named():
    cluster = Cluster()
    cluster.figure("collectives", "lateness_s", 0.05, 10)
    assert cluster.bad()["collectives/lateness_s"].culprits == ("host-1/gpu2",)


def test_what_waits_for_a_late_rank_accuses_no_fabric_and_no_link():
    """Two H100s, one of which slept 50 ms before each call: the check told people to look at cables as well."""
    cluster = Cluster(1, 2)
    cluster.figure("collectives", "lateness_s", 0.05, 1)
    cluster.figure("collectives", "all_reduce_busbw_gbytes_per_s", 0.7)
    cluster.figure("collectives", "pair_gbytes_per_s", 1.3, 1)
    findings = cluster.findings()
    assert {"all_reduce_busbw_gbytes_per_s", "pairs"} <= {f.gate for f in findings if f.status is Status.FAIL}
    assert [s.place for s in suspects_of(findings)] == ["host-0/gpu1"]


def test_a_slow_fabric_without_a_late_rank_is_named_by_where_it_lies():
    for num_nodes, named in ((1, "the fabric inside the node"), (2, "the fabric between the nodes")):
        cluster = Cluster(num_nodes, 2)
        cluster.figure("collectives", "all_reduce_busbw_gbytes_per_s", 0.7)
        assert cluster.bad()["collectives/all_reduce_busbw_gbytes_per_s"].culprits == (named,)


def test_a_stage_that_failed_names_its_rank_and_what_it_left_unmeasured_fails_without_blaming_others():
    cluster = Cluster()
    cluster.outcomes["devices"] = StageOutcome(
        stage="devices", state="failed", error="rank 9: SIGKILL", culprit_ranks=(9,)
    )
    cluster.records["devices"] = [r.model_copy(update={"figures": ()}) for r in cluster.records["devices"]]
    findings = cluster.findings()
    assert cluster.bad()["devices/finished"].culprits == ("host-1/gpu1",)
    assert [s.place for s in suspects_of(findings)] == ["host-1/gpu1"]
    assert cluster.bad()["devices/memory_copy_gbytes_per_s"].status is Status.FAIL


def test_a_stage_that_ran_out_of_time_names_who_was_behind():
    cluster = Cluster()
    cluster.outcomes["devices"] = StageOutcome(
        stage="devices", state="failed", error="ran longer than its limit of 600 s"
    )
    cluster.change("devices", lambda r: r.model_copy(update={"doing": "memory copies", "step": 4}))
    cluster.change("devices", lambda r: r.model_copy(update={"step": 2}), 14)
    assert cluster.bad()["devices/finished"].culprits == ("host-1/gpu6",)


def test_a_rank_without_a_record_fails_the_stage_that_says_it_ended_well():
    cluster = Cluster()
    cluster.records["devices"] = [r for r in cluster.records["devices"] if r.rank != 4]
    assert cluster.bad()["devices/finished"].culprits == ("host-0/gpu4",)


def test_skipped_stages_are_skips_and_a_check_of_nothing_else_is_no_pass():
    cluster = Cluster()
    for stage in cluster.outcomes:
        cluster.outcomes[stage] = StageOutcome(stage=stage, state="yielded", error="the pool is taken by others")
    cluster.records = {stage: [] for stage in cluster.records}
    cluster.training = []
    assert status_of(cluster.findings()) is Status.SKIP
    assert status_of([]) is Status.ERROR


def test_what_could_not_be_run_is_an_error():
    cluster = Cluster()
    cluster.outcomes["storage"] = StageOutcome(stage="storage", state="error", error="sbatch: refused")
    cluster.records["storage"] = []
    assert status_of(cluster.findings()) is Status.ERROR


def test_a_check_that_gives_way_in_the_middle_is_no_pass():
    cluster = Cluster()
    for stage in ("collectives", "storage", "training"):
        cluster.outcomes[stage] = StageOutcome(stage=stage, state="yielded", error="the pool is taken by others")
        cluster.records[stage] = []
    cluster.training = []
    assert status_of(cluster.findings()) is Status.SKIP
    cluster.figure("devices", "memory_pattern_wrong_bytes", 3, 4)
    assert status_of(cluster.findings()) is Status.FAIL


def test_a_later_job_that_numbers_the_nodes_the_other_way_round_blames_the_host_that_was_bad():
    cluster = Cluster()
    cluster.change("devices", lambda r: r.model_copy(update={"host": f"host-{1 - r.node}"}))
    cluster.figure("devices", "memory_copy_gbytes_per_s", 2000.0, 9)
    assert cluster.bad()["devices/memory_copy_gbytes_per_s"].culprits == ("host-0/gpu1",)
    cluster.change("devices", lambda r: r.model_copy(update={"host": "host-7"}), *range(8))
    finding = cluster.bad()["inventory/same_nodes"]
    assert (finding.status, finding.detail) == (Status.WARN, "not in every stage: host-1, host-7")


def test_two_gpus_that_disagree_on_the_bits_accuse_neither_alone():
    cluster = Cluster(1, 2)
    cluster.fact("devices", "step_sha256", "other", 1)
    assert set(cluster.bad()["devices/step_equal_on_all"].culprits) == {"host-0/gpu0", "host-0/gpu1"}


@pytest.mark.parametrize(
    ("stage", "name", "value"),
    [
        ("devices", "matrix_product_float32_tflops_per_s", 5.0),
        ("devices", "device_to_host_gbytes_per_s", 40.0),
        ("devices", "memory_copy_gbytes_per_s", 2500.0),
    ],
)
def test_one_of_two_nodes_that_is_slow_as_a_whole_is_named(stage, name, value):
    cluster = Cluster()
    cluster.figure(stage, name, value, *range(8, 16))
    finding = cluster.bad()[f"{stage}/{name}"]
    assert finding.status is Status.FAIL
    assert set(finding.culprits) == {f"host-1/gpu{i}" for i in range(8)}


def test_chips_that_differ_a_little_each_are_no_two_groups():
    cluster = Cluster()
    for rank in range(16):
        cluster.figure("devices", "device_to_host_gbytes_per_s", 55.0 - 0.9 * rank, rank)
    assert cluster.bad() == {}


def test_of_those_that_were_ended_in_silence_the_ones_that_were_behind_are_named():
    cluster = Cluster(num_nodes=1, width=4)
    outcome = StageOutcome(
        stage="collectives", state="failed", culprit_ranks=(2, 3), error="MissingRanks: waited 60 s for all 4 ranks"
    )
    cluster.outcomes["collectives"] = outcome
    cluster.change("collectives", lambda r: r.model_copy(update={"doing": "barrier", "step": 1 if r.rank == 2 else 2}))
    assert cluster.bad()["collectives/finished"].culprits == ("host-0/gpu2",)
    # Two that died of their own errors are both named, whoever was behind.
    cluster.outcomes["collectives"] = outcome.model_copy(update={"error": "CUDA error"})
    assert cluster.bad()["collectives/finished"].culprits == ("host-0/gpu2", "host-0/gpu3")


def test_a_rate_and_a_peer_of_another_kind_end_nothing():
    cluster = Cluster()
    ports = cluster.records["inventory"][0].facts["infiniband"]
    cluster.fact("inventory", "infiniband", [p | {"rate_gbits_per_s": "fast"} for p in ports], 0)
    assert "inventory/equal_links" in cluster.bad()
    odd = Figure(name="pair_gbytes_per_s", value=1.0, size_bytes=1, peer="x")
    cluster.change("collectives", lambda r: r.model_copy(update={"figures": (*r.figures, odd)}), 3)
    assert cluster.findings()
