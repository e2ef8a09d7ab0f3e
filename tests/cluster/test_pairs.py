"""From slow pairs to who is to blame, and no further than the pairs tell."""

from tasks.cluster.collectives import bus_factor, rounds_of_pairs
from tasks.cluster.pairs import localise, slow_routes
from tasks.contracts.cluster_settings import ThresholdSettings

THRESHOLDS = ThresholdSettings()


def speeds(num_nodes: int, width: int) -> dict[tuple[str, str], float]:
    places = [f"n{node}/gpu{gpu}" for node in range(num_nodes) for gpu in range(width)]
    return {(a, b): 390.0 if a[:2] == b[:2] else 46.0 for a in places for b in places if a != b}


def blamed(found: dict[tuple[str, str], float], floor: float | None = None) -> list[str]:
    return [culprit.place for culprit in localise(slow_routes(found, None, floor, THRESHOLDS), list(found))]


def test_pairs_that_are_alike_blame_nobody():
    assert blamed(speeds(3, 4)) == []


def test_a_gpu_all_of_whose_pairs_are_slow_is_named():
    found = speeds(2, 4)
    for route in found:
        if "n1/gpu2" in route:
            found[route] /= 3
    assert blamed(found) == ["n1/gpu2"]


def test_a_rail_is_named_by_its_gpu_when_only_the_way_to_other_nodes_is_slow():
    found = speeds(3, 4)
    for a, b in found:
        if "n1/gpu2" in (a, b) and a[:2] != b[:2]:
            found[a, b] /= 3
    culprit, *others = localise(slow_routes(found, None, None, THRESHOLDS), list(found))
    assert (culprit.place, others) == ("n1/gpu2", [])
    assert "rail" in culprit.action


def test_a_node_is_named_where_others_reach_each_other_well():
    found = speeds(4, 2)
    for a, b in found:
        if "n2" in (a[:2], b[:2]) and a[:2] != b[:2]:
            found[a, b] = 11.0
    assert blamed(found) == ["n2"]


def test_between_two_nodes_it_is_the_link_and_no_end_is_accused():
    found = speeds(2, 4)
    for a, b in found:
        if a[:2] != b[:2]:
            found[a, b] = 3.7
    # They are all alike: only what such a fabric should reach tells that they are slow.
    assert blamed(found) == []
    assert blamed(found, floor=39.0) == ["the link between n0 and n1"]


def test_one_slow_link_among_three_nodes_is_named_with_both_ends():
    found = speeds(3, 2)
    for a, b in found:
        if {a[:2], b[:2]} == {"n0", "n2"}:
            found[a, b] = 5.0
    assert blamed(found) == ["the link between n0 and n2"]


def test_two_culprits_are_both_found():
    found = speeds(4, 4)
    for route in found:
        if "n0/gpu1" in route or "n3/gpu0" in route:
            found[route] /= 4
    assert sorted(blamed(found)) == ["n0/gpu1", "n3/gpu0"]


def test_a_speed_that_is_no_number_is_slow():
    found = speeds(2, 2)
    found["n0/gpu0", "n1/gpu1"] = float("nan")
    assert blamed(found) == ["the link between n0 and n1"]


def test_every_pair_meets_once_and_nobody_is_in_two_pairs_of_a_round():
    for count in (2, 3, 4, 7, 16):
        rounds = rounds_of_pairs(range(count))
        pairs = [frozenset(pair) for pairs in rounds for pair in pairs]
        assert len(pairs) == len(set(pairs)) == count * (count - 1) // 2
        for pairs_at_once in rounds:
            members = [member for pair in pairs_at_once for member in pair]
            assert len(members) == len(set(members))


def test_bus_bandwidth_is_nccl_tests():
    # https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
    assert bus_factor("all_reduce", 16) == 2 * 15 / 16
    assert [bus_factor(name, 4) for name in ("all_gather", "reduce_scatter", "all_to_all")] == [0.75] * 3
    assert [bus_factor(name, 8) for name in ("broadcast", "send_recv")] == [1.0] * 2
