"""What the inventory must show: each thing that is missing, unequal, ill or not told is named, and nothing else is."""

import pytest

from tasks.contracts.cluster_report import Status
from tests.cluster.clusters import GPU, Cluster


def test_a_wrong_version_on_one_node_names_the_node():
    cluster = Cluster(3, 8)
    cluster.fact("inventory", "nccl", "2.26.2", *range(8, 16))
    finding = cluster.bad()["inventory/equal_nccl"]
    assert finding.culprits == ("host-1",)
    assert "2.26.2, the others 2.28.3" in finding.detail


def test_a_missing_gpu_names_its_node():
    cluster = Cluster()
    cluster.fact("inventory", "gpus", [GPU] * 7, 8)
    finding = cluster.bad()["inventory/num_gpus"]
    assert finding.culprits == ("host-1",)
    assert "7 GPUs instead of 8" in finding.detail


def test_a_busy_gpu_is_an_error_and_not_a_bad_figure():
    cluster = Cluster()
    cluster.fact("inventory", "gpus", [GPU] * 5 + [GPU | {"busy_processes": [4711]}] + [GPU] * 2, 0)
    finding = cluster.bad()["inventory/gpu_busy"]
    assert (finding.status, finding.culprits) == (Status.ERROR, ("host-0/gpu5",))


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        ({"remap_failed": True}, "gpu_remap_failed"),
        ({"remap_pending": True}, "gpu_remap_pending"),
        ({"ecc_uncorrected": 2}, "gpu_ecc_uncorrected"),
        ({"ecc_uncorrected": None}, "gpu_ecc_uncorrected"),
        ({"pcie_width": 8}, "gpu_pcie_width"),
        ({"pcie_width": None}, "gpu_pcie_width"),
        ({"nvlinks_up": 17}, "gpu_nvlinks_up"),
        ({"power_limit_watts": 500.0}, "equal_gpu_power_limit_watts"),
        ({"driver": "550.1"}, "equal_gpu_driver"),
    ],
)
def test_a_gpu_whose_health_is_bad_or_not_told_is_named(change, gate):
    cluster = Cluster()
    cluster.fact("inventory", "gpus", [GPU, GPU, GPU | change, *[GPU] * 5], 8)
    finding = cluster.bad()[f"inventory/{gate}"]
    assert (finding.status, finding.culprits) == (Status.FAIL, ("host-1/gpu2",))


@pytest.mark.parametrize("gpus", [None, "seven", [None] * 8])
def test_an_inventory_that_cannot_be_understood_fails(gpus):
    cluster = Cluster()
    cluster.fact("inventory", "gpus", gpus, 0)
    assert cluster.bad()["inventory/num_gpus"].culprits == ("host-0",)


def test_a_port_that_is_down_is_named_with_its_adapter():
    cluster = Cluster()
    ports = cluster.records["inventory"][8].facts["infiniband"]
    cluster.fact("inventory", "infiniband", [*ports[:4], ports[4] | {"state": "DOWN"}, *ports[5:]], 8)
    assert cluster.bad()["inventory/link_state"].culprits == ("host-1/mlx5_4",)


def test_a_clock_that_is_off_names_its_node_even_where_the_others_are_told_against_it():
    cluster = Cluster(num_nodes=3, width=2)
    cluster.figure("inventory", "clock_ahead_s", -3.0, 2, 3)
    assert cluster.bad()["inventory/clock_skew"].culprits == ("host-1",)
    # Rank 0's own, seen from which all others are off.
    cluster.figure("inventory", "clock_ahead_s", -3.0, *range(2, 6))
    finding = cluster.bad()["inventory/clock_skew"]
    assert finding.culprits == ("host-0",)
    assert finding.value == 3.0


def test_of_two_clocks_neither_is_known_to_be_right():
    cluster = Cluster()
    cluster.figure("inventory", "clock_ahead_s", -1.5, *range(8, 16))
    assert cluster.bad()["inventory/clock_skew"].culprits == ("host-0", "host-1")
    cluster.figure("inventory", "clock_ahead_s", -0.5, *range(8, 16))
    assert "inventory/clock_skew" not in cluster.bad()


def test_xids_and_a_kernel_log_that_cannot_be_read_are_warnings():
    for xids in (["NVRM: Xid (PCI:0000:1b:00): 79, GPU has fallen off the bus."], "cannot be read", None):
        cluster = Cluster()
        cluster.fact("inventory", "xids", xids, 8)
        finding = cluster.bad()["inventory/xid"]
        assert (finding.status, finding.culprits) == (Status.WARN, ("host-1",))


def test_versions_that_differ_by_halves_are_decided_by_the_submitting_process_or_name_both():
    cluster = Cluster()
    cluster.fact("inventory", "torch", "2.12.0", *range(8))
    assert cluster.bad()["inventory/equal_torch"].culprits == ("host-0", "host-1")
    cluster.own_versions = {"torch": "2.13.0"}
    assert cluster.bad()["inventory/equal_torch"].culprits == ("host-0",)


def test_of_two_halves_the_one_with_fewer_processors_lacks_something():
    cluster = Cluster(2, 1)
    cluster.fact("inventory", "num_processors", 64, 0)
    assert cluster.bad()["inventory/equal_num_processors"].culprits == ("host-0/gpu0",)


def test_another_version_in_one_process_of_several_names_its_node():
    cluster = Cluster()
    cluster.own_versions = {"torch": "2.13.0"}
    cluster.fact("inventory", "torch", "2.12.0", 8)
    finding = cluster.bad()["inventory/equal_torch"]
    assert finding.culprits == ("host-1",)
    assert "2.12.0 and 2.13.0" in finding.detail


def test_a_port_that_nobody_connected_is_no_fault_and_one_that_works_elsewhere_is():
    cluster = Cluster()
    ports = cluster.records["inventory"][0].facts["infiniband"]
    idle = [p | {"state": "DOWN"} if p["device"] == "mlx5_7" else p for p in ports]
    cluster.fact("inventory", "infiniband", idle, 0, 8)
    assert "inventory/link_state" not in cluster.bad()
    cluster.fact("inventory", "infiniband", ports, 0)
    assert cluster.bad()["inventory/link_state"].culprits == ("host-1/mlx5_7",)
    cluster.fact("inventory", "infiniband", [p | {"state": "DOWN"} for p in ports], 0, 8)
    assert len(cluster.bad()["inventory/link_state"].culprits) == 16


def test_a_job_of_fewer_gpus_than_a_node_has_is_complete():
    cluster = Cluster(width=4)
    gpus = cluster.records["inventory"][0].facts["gpus"]
    cluster.fact("inventory", "gpus", [*gpus, *gpus], 0, 4)
    assert "inventory/num_gpus" not in cluster.bad()


@pytest.mark.parametrize(
    ("name", "value"),
    [("infiniband", [None]), ("infiniband", 7), ("gpus", 7), ("gpus", [None]), ("torch", ["2.13"])],
)
def test_what_cannot_be_read_is_a_finding_and_no_end(name, value):
    cluster = Cluster()
    cluster.fact("inventory", name, value, 0)
    assert any("host-0" in finding.culprits for finding in cluster.bad().values())
