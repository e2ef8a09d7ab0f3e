"""Who becomes champion: only a version that passed and beats the present one on the same requests."""

import pytest

from tasks.contracts.comparison import ChampionFigures
from tasks.evaluation.compare import champion_not_asked
from tasks.evaluation.statistics import paired_difference, share
from tasks.tracking.mlflow_runs import RegisteredAdapter, takes_the_title

CHAMPION = {"dataset_sha256": "d", "exact_match": "0.9", "base_weights_sha256": "b"}


def registered(tags, number="3"):
    return None if tags is None else RegisteredAdapter("function-calling-m", number, "run", tags)


def asked(before, after, version="function-calling-m version 3"):
    """The champion right and wrong, then the candidate, request by request."""
    paired = paired_difference(before, after, range(len(before)))
    return ChampionFigures(version, share(sum(before), len(before)), paired, "")


@pytest.mark.parametrize(
    ("candidate", "champion", "passed", "moves", "why"),
    [
        ({"dataset_sha256": "d", "exact_match": "0.99"}, CHAMPION, False, False, "gates did not pass"),
        ({"dataset_sha256": "d", "exact_match": "0.2"}, None, True, True, "first to pass"),
        ({"dataset_sha256": "d", "exact_match": "0.91"}, CHAMPION, True, True, "91.0% beats 90.0%"),
        ({"dataset_sha256": "d", "exact_match": "0.9"}, CHAMPION, True, False, "does not beat"),
        ({"dataset_sha256": "other", "exact_match": "0.99"}, CHAMPION, True, False, "another dataset"),
        ({"dataset_sha256": "d"}, CHAMPION, True, False, "missing"),
        (
            {"dataset_sha256": "d", "exact_match": "0.99"},
            {"dataset_sha256": "d", "base_weights_sha256": "b"},
            True,
            False,
            "missing",
        ),
        ({"exact_match": "0.99", "base_weights_sha256": "new"}, CHAMPION, True, False, "other base weights"),
    ],
)
def test_a_champion_is_beaten_or_stays(candidate, champion, passed, moves, why):
    moved, reason = takes_the_title({"base_weights_sha256": "b"} | candidate, registered(champion), None, passed=passed)
    assert moved is moves
    assert why in reason


BETTER = asked([True, False, False], [True, True, True])


@pytest.mark.parametrize(
    ("against", "passed", "moves", "why"),
    [
        (
            BETTER,
            True,
            True,
            "right more often than function-calling-m version 3, of 3 requests it fixes 2 and breaks 0",
        ),
        (BETTER, False, False, "gates did not pass"),
        (asked([True, False], [False, True]), True, False, "not right more often than function-calling-m version 3"),
        (asked([True, True], [False, True]), True, False, "of 2 requests it fixes 0 and breaks 1"),
        (asked([], []), True, False, "no request was scored"),
        (
            champion_not_asked("function-calling-m version 3", "no node left"),
            True,
            False,
            "another dataset; The champion, ",
        ),
        (
            champion_not_asked("function-calling-m version 3", "no node left"),
            True,
            False,
            "was not asked: no node left.",
        ),
        # Another has taken the title while this run was at work.
        (
            asked([False], [True], "function-calling-m version 2"),
            True,
            False,
            "version 3 took the title while function-calling-m version 2 was asked",
        ),
    ],
)
def test_a_champion_that_was_asked_is_beaten_on_those_requests(against, passed, moves, why):
    """Whatever its own test set said of it."""
    candidate = {"dataset_sha256": "other", "exact_match": "0.1", "base_weights_sha256": "b"}
    moved, reason = takes_the_title(candidate, registered(CHAMPION), against, passed=passed)
    assert moved is moves
    assert why in reason
