"""What ports counted while messages went over them names the adapter; what they had counted before accuses nobody."""

import pytest

from tasks.cluster.port_errors import AFTER, BEFORE
from tasks.contracts.cluster_report import Finding, StageOutcome, Status
from tests.cluster.clusters import Cluster


def changed(cluster: Cluster, rank: int, number: int, **values) -> Cluster:
    ports = [dict(port) for port in cluster.records["collectives"][rank].facts[AFTER]]
    ports[number] |= values
    cluster.fact("collectives", AFTER, ports, rank)
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
        ({"link_downed": None}, Status.FAIL, "link_downed 0 -> None"),
        ({"state": "DOWN"}, Status.FAIL, "is DOWN now"),
        ({"state": None}, Status.FAIL, "is not told now"),
        ({"device": "another"}, Status.FAIL, "is not there any more"),
        ({"symbol_error": 7}, Status.WARN, "symbol_error 0 -> 7"),
        ({"packet_seq_err": 3, "local_ack_timeout_err": 1}, Status.WARN, "local_ack_timeout_err 0 -> 1"),
    ],
)
def test_what_came_under_load_names_its_adapter(values, status, said):
    finding = gate(changed(Cluster(), 8, 3, **values))
    assert (finding.status, finding.culprits) == (status, ("host-1/mlx5_3",))
    assert said in finding.detail
    assert finding.action


def test_a_broken_link_is_told_before_a_noisy_one():
    cluster = changed(changed(Cluster(), 0, 1, symbol_error=5), 8, 3, link_downed=1)
    assert gate(cluster).culprits == ("host-1/mlx5_3",)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"link_downed": 4}, {"link_downed": 4}),
        ({"link_downed": 4, "symbol_error": 9}, {"link_downed": 0, "symbol_error": 0}),
        ({"packet_seq_err": None}, {"packet_seq_err": None}),
        ({"state": "DOWN"}, {"state": "DOWN"}),
    ],
)
def test_old_counts_counts_set_back_and_counters_that_are_not_there_accuse_nobody(before, after):
    cluster = changed(Cluster(), 8, 3, **after)
    ports = [dict(port) for port in cluster.records["collectives"][8].facts[BEFORE]]
    ports[3] |= before
    cluster.fact("collectives", BEFORE, ports, 8)
    assert gate(cluster).status is Status.PASS


def test_there_is_nothing_to_say_without_ports_on_one_node_or_of_a_stage_that_did_not_end():
    without = Cluster()
    for name in (BEFORE, AFTER):
        without.fact("collectives", name, [])
    unended = Cluster()
    unended.outcomes["collectives"] = StageOutcome(
        stage="collectives", state="failed", error="rank 9", culprit_ranks=(9,)
    )
    for cluster in (without, unended, Cluster(num_nodes=1)):
        assert not [f for f in cluster.findings() if f.gate == "port_errors"]


@pytest.mark.parametrize("told", ["seven", None, [None], 7])
def test_ports_that_cannot_be_understood_afterwards_are_no_good_ports(told):
    cluster = Cluster()
    cluster.fact("collectives", AFTER, told, 8)
    finding = gate(cluster)
    assert finding.status is Status.FAIL
    assert finding.culprits[0] == "host-1/mlx5_0"
