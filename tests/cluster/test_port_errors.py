"""What ports counted while messages went over them names the adapter; what is not known accuses nobody."""

import pytest

from tasks.cluster.port_errors import AFTER, BEFORE, WATCHED
from tasks.contracts.cluster_report import Finding, StageOutcome, Status
from tasks.hardware.infiniband import BROKEN, NOISY
from tests.cluster.clusters import Cluster

MUCH = 5
"""More than a link may have in the minute that the sound cluster's ports are watched."""


def changed(cluster: Cluster, rank: int, number: int, name: str = AFTER, **values) -> Cluster:
    ports = [dict(port) for port in cluster.records["collectives"][rank].facts[name]]
    ports[number] |= values
    cluster.fact("collectives", name, ports, rank)
    return cluster


def gate(cluster: Cluster) -> Finding:
    (finding,) = [f for f in cluster.findings() if f.gate == "port_errors"]
    return finding


def test_ports_that_counted_nothing_pass():
    assert gate(Cluster()).status is Status.PASS


@pytest.mark.parametrize(
    ("values", "status", "said"),
    [
        ({"link_downed": 1}, Status.FAIL, "link_downed 0 -> 1"),
        ({"link_error_recovery": 2, "symbol_error": 7}, Status.FAIL, "link_error_recovery 0 -> 2"),
        ({"state": "DOWN"}, Status.FAIL, "is DOWN now"),
        ({"state": None}, Status.FAIL, "is not told now"),
        ({"device": "another"}, Status.FAIL, "is not there any more"),
        ({"symbol_error": MUCH}, Status.WARN, "symbol_error 0 -> 5"),
        ({"excessive_buffer_overrun_errors": MUCH}, Status.WARN, "excessive_buffer_overrun_errors 0 -> 5"),
        ({"packet_seq_err": 1, "local_ack_timeout_err": MUCH}, Status.WARN, "local_ack_timeout_err 0 -> 5"),
    ],
)
def test_what_came_under_load_names_its_adapter(values, status, said):
    finding = gate(changed(Cluster(), 8, 3, **values))
    assert (finding.status, finding.culprits) == (status, ("host-1/mlx5_3",))
    assert said in finding.detail
    assert "packet_seq_err" not in finding.detail
    assert finding.action


def test_a_broken_link_is_told_before_a_noisy_one():
    cluster = changed(changed(Cluster(), 0, 1, symbol_error=MUCH), 8, 3, link_downed=1)
    assert gate(cluster).culprits == ("host-1/mlx5_3",)


@pytest.mark.parametrize("adapters", [["mlx5_0"], [], None, 7])
def test_a_link_of_an_adapter_that_nccl_does_not_use_or_does_not_tell_of_is_a_warning(adapters):
    cluster = changed(Cluster(), 8, 3, link_downed=1)
    transport = cluster.records["collectives"][8].facts["transport"]
    cluster.fact("collectives", "transport", transport | {"adapters": adapters}, 8)
    assert (gate(cluster).status, gate(cluster).culprits) == (Status.WARN, ("host-1/mlx5_3",))


def test_a_single_error_in_a_long_time_is_what_a_link_may_have():
    assert gate(changed(Cluster(), 8, 3, symbol_error=2)).status is Status.PASS
    longer = changed(Cluster(), 8, 3, symbol_error=MUCH)
    longer.fact("collectives", WATCHED, 600.0, 8)
    assert gate(longer).status is Status.PASS


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"link_downed": 4}, {"link_downed": 4}),
        ({"link_downed": 4, "symbol_error": 9}, {"link_downed": 0, "symbol_error": 0}),
        ({"packet_seq_err": None}, {"packet_seq_err": None}),
        ({"link_downed": 4}, {"link_downed": None}),
        ({"state": "DOWN"}, {"state": "DOWN"}),
    ],
)
def test_old_counts_counts_set_back_and_counters_that_are_not_told_accuse_nobody(before, after):
    assert gate(changed(changed(Cluster(), 8, 3, **after), 8, 3, BEFORE, **before)).status is Status.PASS


def test_a_counter_at_its_end_tells_nothing_more_and_that_is_said():
    full = {"link_downed": 255}
    finding = gate(changed(changed(Cluster(), 8, 3, **full), 8, 3, BEFORE, **full))
    assert (finding.status, finding.culprits) == (Status.WARN, ("host-1/mlx5_3",))
    assert "link_downed is at its end, 255" in finding.detail
    assert "perfquery -R" in finding.action


@pytest.mark.parametrize("fact", [BEFORE, AFTER, WATCHED])
@pytest.mark.parametrize("told", ["seven", None, [None]])
def test_what_cannot_be_understood_is_not_known_and_accuses_nobody(fact, told):
    cluster = Cluster()
    cluster.fact("collectives", fact, told, 8)
    finding = gate(cluster)
    assert (finding.status, finding.culprits, finding.detail) == (Status.SKIP, (), "known of 1 of 2 nodes")


def test_nor_is_anything_known_of_a_node_without_a_record_or_of_ports_without_counters():
    cluster = Cluster()
    cluster.records["collectives"] = cluster.records["collectives"][:8]
    assert gate(cluster).detail == "known of 1 of 2 nodes"
    of_others = Cluster()
    for rank in (0, 8):
        for name in (BEFORE, AFTER):
            for number in range(8):
                changed(of_others, rank, number, name, **dict.fromkeys(BROKEN + NOISY))
    assert (gate(of_others).status, gate(of_others).detail) == (Status.SKIP, "known of 0 of 2 nodes")


def test_there_is_nothing_to_say_without_ports_without_gpus_on_one_node_or_of_a_stage_that_did_not_end():
    without = Cluster()
    for name in (BEFORE, AFTER):
        without.fact("collectives", name, [])
    unended = Cluster()
    unended.outcomes["collectives"] = StageOutcome(
        stage="collectives", state="failed", error="rank 9", culprit_ranks=(9,)
    )
    for cluster in (without, unended, Cluster(num_nodes=1), Cluster(gpus=False)):
        assert not [f for f in cluster.findings() if f.gate == "port_errors"]
