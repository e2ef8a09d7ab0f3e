"""What comes up under load is held against the inventory of before, and what is not told is no zero."""

import pytest

from tasks.contracts.cluster_report import Finding, StageOutcome, Status
from tests.cluster.clusters import Cluster


def soaked(**check) -> Cluster:
    return Cluster(stages=("inventory", "devices", "endurance"), soak_minutes=10, **check)


def change_gpu(cluster: Cluster, rank: int, number: int, **values) -> None:
    gpus = [dict(gpu) for gpu in cluster.records["endurance"][rank].facts["gpus"]]
    gpus[number] |= values
    cluster.fact("endurance", "gpus", gpus, rank)


def gate(cluster: Cluster, name: str) -> Finding:
    (finding,) = [f for f in cluster.findings() if f.stage == "endurance" and f.gate == name]
    return finding


def test_what_is_as_before_the_load_passes():
    cluster = soaked()
    assert cluster.bad() == {}
    for name in ("gpu_errors_under_load", "pcie_generation_under_load", "xid_under_load"):
        assert gate(cluster, name).status is Status.PASS


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"ecc_uncorrected": 2}, "ecc_uncorrected 0 -> 2"),
        ({"remap_pending": True}, "remap_pending False -> True"),
        ({"ecc_uncorrected": None}, "ecc_uncorrected 0 -> None"),
        ({"uuid": "another"}, "is not seen any more"),
    ],
)
def test_an_error_that_came_under_load_names_its_gpu(values, said):
    cluster = soaked()
    change_gpu(cluster, 8, 3, **values)
    finding = gate(cluster, "gpu_errors_under_load")
    assert (finding.status, finding.culprits) == (Status.FAIL, ("host-1/gpu3",))
    assert said in finding.detail


def test_an_error_that_was_there_before_is_the_inventorys():
    cluster = soaked()
    for stage in ("inventory", "endurance"):
        gpus = [gpu | {"ecc_uncorrected": 1} for gpu in cluster.records[stage][8].facts["gpus"]]
        cluster.fact(stage, "gpus", gpus, 8)
    assert gate(cluster, "gpu_errors_under_load").status is Status.PASS
    assert "inventory/gpu_ecc_uncorrected" in cluster.bad()


@pytest.mark.parametrize(("now", "said"), [(1, "generation 1 of 5 under load"), (None, "was not told")])
def test_a_link_that_stays_low_under_load_names_its_gpu(now, said):
    cluster = soaked()
    change_gpu(cluster, 0, 6, pcie_generation=now)
    finding = gate(cluster, "pcie_generation_under_load")
    assert (finding.status, finding.culprits) == (Status.FAIL, ("host-0/gpu6",))
    assert said in finding.detail


def test_a_new_xid_fails_an_old_one_does_not_and_a_log_that_cannot_be_read_is_a_warning():
    old, new = "NVRM: Xid (PCI:0000:01:00): 63", "NVRM: Xid (PCI:0000:41:00): 79"
    cluster = soaked()
    cluster.fact("inventory", "xids", [old], 8)
    cluster.fact("endurance", "xids", [old], 8)
    assert gate(cluster, "xid_under_load").status is Status.PASS
    cluster.fact("endurance", "xids", [old, new], 8)
    finding = gate(cluster, "xid_under_load")
    assert (finding.status, finding.culprits) == (Status.FAIL, ("host-1",))
    assert new in finding.detail
    # The same error of the same GPU once more: the line is the same.
    cluster.fact("endurance", "xids", [old, old], 8)
    assert gate(cluster, "xid_under_load").detail == f"host-1: {old}"
    unread = soaked()
    unread.fact("endurance", "xids", "the kernel's log cannot be read: Permission denied", 0)
    assert gate(unread, "xid_under_load").status is Status.WARN
    assert "Permission denied" in gate(unread, "xid_under_load").detail


def test_gpus_that_were_not_read_again_fail_and_a_stage_that_did_not_end_has_its_own_finding():
    cluster = soaked()
    cluster.change("endurance", lambda r: r.model_copy(update={"facts": {}}), 8)
    for name in ("gpu_errors_under_load", "pcie_generation_under_load"):
        assert gate(cluster, name).culprits == ("host-1",)
    cluster.outcomes["endurance"] = StageOutcome(stage="endurance", state="failed", error="rank 9", culprit_ranks=(9,))
    assert not [f for f in cluster.findings() if f.gate.endswith("_under_load")]


def test_a_node_that_the_inventory_did_not_see_is_not_known_and_not_accused():
    cluster = soaked()
    cluster.change("endurance", lambda r: r.model_copy(update={"host": "host-7"}), *range(8, 16))
    finding = gate(cluster, "gpu_errors_under_load")
    assert (finding.status, finding.detail) == (Status.WARN, "host-7: is not in the inventory")
    assert not [f for f in cluster.findings() if f.status is Status.FAIL]


def test_on_processors_nothing_is_read_again():
    assert not [f for f in soaked(gpus=False).findings() if f.gate.endswith("_under_load")]
