"""Statistics against the library's own, and against chance."""

import numpy as np
import pytest
from scipy.stats import binomtest

from tasks.evaluation.statistics import paired_difference, share


def test_intervals_equal_scipys_wilson():
    for n in (1, 7, 40, 250):
        for successes in range(0, n + 1, max(1, n // 7)):
            ours = share(successes, n)
            theirs = binomtest(successes, n).proportion_ci(method="wilson")
            assert ours.low == pytest.approx(theirs.low, abs=1e-12)
            assert ours.high == pytest.approx(theirs.high, abs=1e-12)


def test_nothing_scored_has_no_value():
    assert share(0, 0).value is None
    assert paired_difference([], []).p_value is None


def test_mcnemar_by_hand():
    # 8 fixed, 1 broken: two-sided exact p = 2 * (C(9,0) + C(9,1)) / 2^9.
    before = [False] * 8 + [True] * 1 + [True] * 5
    after = [True] * 8 + [False] * 1 + [True] * 5
    paired = paired_difference(before, after)
    assert paired.p_value == pytest.approx(2 * (1 + 9) / 2**9)
    assert (paired.num_fixed, paired.num_broken) == (8, 1)
    assert paired.difference == pytest.approx(7 / 14)


def test_a_model_compared_with_itself_is_no_improvement():
    answers = [True, False] * 50
    paired = paired_difference(answers, answers)
    assert (paired.difference, paired.low, paired.high, paired.p_value) == (0, 0, 0, 1)


def test_the_bootstrap_interval_covers_the_truth():
    rng = np.random.default_rng(5)
    covered = 0
    for seed in range(200):
        before = rng.random(100) < 0.5
        after = np.where(rng.random(100) < 0.2, ~before, before)
        paired = paired_difference(before.tolist(), after.tolist(), seed)
        covered += paired.low <= 0 <= paired.high
    assert covered >= 180


def test_different_test_sets_are_refused():
    with pytest.raises(ValueError, match="same examples"):
        paired_difference([True], [True, False])
