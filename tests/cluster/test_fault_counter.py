"""What ``python -m tests.faults.cluster`` counts: nothing that is right by luck, and nothing that was not measured."""

import argparse
from collections import Counter

import pytest

from tasks.cluster.report import build_report
from tasks.contracts.cluster_report import Problem, Report, StageOutcome
from tests.cluster.clusters import Cluster
from tests.faults.cluster import CLEAN, FAULTS, GATES, at_least_one, problem_of, told


def emulated() -> Cluster:
    """Two nodes of one process, sound, which are one host."""
    cluster = Cluster(2, 1, gpus=False, stages=CLEAN)
    for stage in cluster.records:
        cluster.change(stage, lambda r: r.model_copy(update={"host": "here"}))
    return cluster


def reported(cluster: Cluster) -> Report:
    return build_report(cluster.evidence, "run", 0.0, 1.0)


def corrupted(cluster: Cluster, rank: int) -> Cluster:
    problem = Problem(gate="all_reduce_correct", error="1 of 256 elements are wrong")
    cluster.change("collectives", lambda r: r.model_copy(update={"problems": (problem,)}), rank)
    return cluster


def test_a_fault_counts_when_its_own_gate_names_who_did_it_first():
    report = reported(corrupted(emulated(), 1))
    assert problem_of(report, "corrupt", 1) == ""
    assert problem_of(report, "corrupt", 0).startswith("blames node1/process0 instead of node0/process0")


def test_the_right_place_for_another_reason_is_luck_and_does_not_count():
    report = reported(corrupted(emulated(), 1))
    assert problem_of(report, "half_threads", 1).startswith(
        "blames node1/process0 for something else: collectives/all_red"
    )


def test_a_fault_that_nobody_saw_does_not_count():
    assert problem_of(reported(emulated()), "corrupt", 1).startswith("not caught: PASS")


def test_a_clean_run_counts_when_all_of_it_was_measured_and_nothing_is_bad():
    assert problem_of(reported(emulated()), "clean", 0) == ""
    assert "all_reduce_correct" in problem_of(reported(corrupted(emulated(), 0)), "clean", 0)


@pytest.mark.parametrize("state", ["yielded", "skipped"])
def test_a_clean_run_that_gave_way_or_left_a_stage_out_is_no_clean_run(state):
    cluster = emulated()
    cluster.outcomes["training"] = StageOutcome(stage="training", state=state, error="the pool is taken by others")
    cluster.training = []
    assert problem_of(reported(cluster), "clean", 0) == f"training {state}: the pool is taken by others"


def test_every_fault_has_gates_and_the_counts_name_each_kind_with_how_often_it_was_tried():
    assert GATES.keys() == FAULTS.keys()
    lines = told(Counter({"dead": 2}), Counter({"dead": 3, "clean": 1})).splitlines()
    assert lines == ["  2 of 3  dead: caught by its gate, culprit named first", "  0 of 1  clean: as sound as it is"]


def test_none_of_none_is_refused():
    with pytest.raises(argparse.ArgumentTypeError, match="0: none of none would be all of them"):
        at_least_one("0")
    assert at_least_one("20") == 20
