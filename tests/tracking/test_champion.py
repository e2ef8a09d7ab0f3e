"""Who becomes champion: only a version that passed and beats the present one on the same test set."""

import pytest

from tasks.tracking.mlflow_runs import takes_the_title

CHAMPION = {"dataset_sha256": "d", "exact_match": "0.9"}


@pytest.mark.parametrize(
    ("candidate", "champion", "passed", "moves", "why"),
    [
        ({"dataset_sha256": "d", "exact_match": "0.99"}, CHAMPION, False, False, "gates did not pass"),
        ({"dataset_sha256": "d", "exact_match": "0.2"}, None, True, True, "first to pass"),
        ({"dataset_sha256": "d", "exact_match": "0.91"}, CHAMPION, True, True, "91.0% beats 90.0%"),
        ({"dataset_sha256": "d", "exact_match": "0.9"}, CHAMPION, True, False, "does not beat"),
        ({"dataset_sha256": "other", "exact_match": "0.99"}, CHAMPION, True, False, "another dataset"),
        ({"dataset_sha256": "d"}, CHAMPION, True, False, "missing"),
        ({"dataset_sha256": "d", "exact_match": "0.99"}, {"dataset_sha256": "d"}, True, False, "missing"),
    ],
)
def test_a_champion_is_beaten_or_stays(candidate, champion, passed, moves, why):
    moved, reason = takes_the_title(candidate, champion, passed=passed)
    assert moved is moves
    assert why in reason
