"""Statistics against the libraries' own, and against chance."""

import numpy as np
import pytest
from scipy.stats import binomtest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from tasks.evaluation.statistics import (
    holm,
    is_improvement,
    paired_difference,
    requests_needed,
    share,
    sign_flip_p_value,
)

NUM_TABLES = 1000
NUM_NULL_COMPARISONS = 2000


def test_a_thousand_intervals_equal_scipys_and_statsmodels():
    rng = np.random.default_rng(1)
    for _ in range(NUM_TABLES):
        n = int(rng.integers(1, 500))
        successes = int(rng.integers(0, n + 1))
        ours = share(successes, n)
        theirs = binomtest(successes, n).proportion_ci(method="wilson")
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
        assert (ours.low, ours.high) == pytest.approx(proportion_confint(successes, n, method="wilson"), abs=1e-12)


def test_a_thousand_mcnemar_tests_equal_scipys_and_statsmodels():
    rng = np.random.default_rng(2)
    for _ in range(NUM_TABLES):
        fixed, broken, same = (int(n) for n in rng.integers(0, 60, 3))
        ours = sign_flip_p_value([1] * fixed + [-1] * broken + [0] * same)
        theirs = mcnemar([[same, broken], [fixed, 0]], exact=True).pvalue if fixed + broken else 1.0
        assert ours == pytest.approx(theirs, abs=1e-12)
        if fixed + broken:
            assert ours == pytest.approx(binomtest(fixed, fixed + broken).pvalue, abs=1e-12)


def test_corrections_for_several_comparisons_equal_statsmodels_holm():
    rng = np.random.default_rng(3)
    # Theirs takes a tenth of a second each.
    for _ in range(5):
        p_values = rng.random(int(rng.integers(1, 12))) ** 3
        assert holm(list(p_values)) == pytest.approx(list(multipletests(p_values, method="holm")[1]), abs=1e-12)


def test_a_missing_p_value_is_no_comparison():
    assert holm([0.01, None, 0.02]) == [0.02, None, 0.02]


def test_nothing_scored_has_no_value():
    assert share(0, 0).value is None
    assert paired_difference([], []).p_value is None
    assert not is_improvement(paired_difference([], []), 0.05)


def test_mcnemar_by_hand():
    # 8 fixed, 1 broken: two-sided exact p = 2 * (C(9,0) + C(9,1)) / 2^9.
    before = [False] * 8 + [True] * 1 + [True] * 5
    after = [True] * 8 + [False] * 1 + [True] * 5
    paired = paired_difference(before, after)
    assert paired.p_value == pytest.approx(2 * (1 + 9) / 2**9)
    assert (paired.num_fixed, paired.num_broken) == (8, 1)
    assert paired.difference == pytest.approx(7 / 14)


def test_clusters_by_hand():
    # Sums 2, 2, 1, -1: of the 16 ways to set the signs, 2 + 2 reach at least 4 or at most -4.
    assert sign_flip_p_value([2, 2, 1, -1]) == pytest.approx(
        sum(abs(2 * a + 2 * b + c + d) >= 4 for a in (1, -1) for b in (1, -1) for c in (1, -1) for d in (1, -1)) / 16
    )


def test_a_model_compared_with_itself_is_no_improvement():
    answers = [True, False] * 50
    paired = paired_difference(answers, answers)
    assert (paired.difference, paired.low, paired.high, paired.p_value) == (0, 0, 0, 1)
    assert not is_improvement(paired, 0.05)


def test_the_bootstrap_interval_equals_scipys():
    from scipy.stats import bootstrap

    rng = np.random.default_rng(4)
    for _ in range(5):
        before, after = rng.random(80) < 0.4, rng.random(80) < 0.6
        ours = paired_difference(before.tolist(), after.tolist())
        differences = after.astype(int) - before.astype(int)
        theirs = bootstrap((differences,), np.mean, n_resamples=10_000, method="percentile", random_state=1)
        interval = theirs.confidence_interval
        # Both are random; a step is 1/80.
        assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), abs=1.01 / 80)


def test_the_bootstrap_interval_covers_the_truth():
    rng = np.random.default_rng(5)
    covered = 0
    for seed in range(200):
        before = rng.random(100) < 0.5
        after = np.where(rng.random(100) < 0.2, ~before, before)
        paired = paired_difference(before.tolist(), after.tolist(), seed=seed)
        covered += paired.low <= 0 <= paired.high
    assert covered >= 180


def null_comparison(rng: np.random.Generator, repeats: int, alpha: float) -> bool:
    """Two models that are equally good on prompts that each stand ``repeats`` times and are answered alike."""
    num_prompts = 60
    rate = rng.random()
    before, after = (np.repeat(rng.random(num_prompts) < rate, repeats) for _ in range(2))
    clusters = np.repeat(np.arange(num_prompts), repeats).tolist()
    return is_improvement(paired_difference(before.tolist(), after.tolist(), clusters), alpha)


@pytest.mark.parametrize(("repeats", "num_comparisons"), [(1, NUM_NULL_COMPARISONS), (4, 500)])
def test_chance_is_called_improvement_in_at_most_one_of_twenty_null_comparisons(repeats, num_comparisons):
    rng = np.random.default_rng(6)
    claimed = sum(null_comparison(rng, repeats, 0.05) for _ in range(num_comparisons))
    assert claimed <= 0.05 * num_comparisons
    # The test is not one that never says yes: a one-sided half of 5 % is left.
    assert claimed >= 0.005 * num_comparisons


def test_repeated_prompts_are_no_further_evidence():
    before, after = [False] * 6, [True] * 6
    alone = paired_difference(before, after, list(range(6)))
    repeated = paired_difference(before * 5, after * 5, list(range(6)) * 5)
    assert repeated.p_value == alone.p_value == pytest.approx(2 / 2**6)
    assert (repeated.n, repeated.num_clusters) == (30, 6)
    assert paired_difference(before * 5, after * 5).p_value < 1e-6


def test_as_many_requests_as_needed_show_the_difference_four_times_out_of_five():
    difference, discordant = 0.1, 0.3
    n = requests_needed(difference, discordant)
    rng = np.random.default_rng(7)
    shares = [(discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant]
    shown = 0
    for _ in range(2000):
        fixed, broken, _ = rng.multinomial(n, shares)
        shown += binomtest(int(fixed), int(fixed + broken)).pvalue < 0.05
    # The exact test is a little stricter than the formula's.
    assert 0.75 < shown / 2000 < 0.85
    assert requests_needed(0.05, 0.3) > 3 * n


@pytest.mark.parametrize(("difference", "discordant"), [(0, 0.3), (0.4, 0.3), (0.1, 1.2)])
def test_impossible_differences_are_refused(difference, discordant):
    with pytest.raises(ValueError, match="impossible"):
        requests_needed(difference, discordant)


def test_different_test_sets_are_refused():
    with pytest.raises(ValueError, match="same examples"):
        paired_difference([True], [True, False])
    with pytest.raises(ValueError, match="in 1 places"):
        paired_difference([True, True], [True, False], ["a"])


@pytest.mark.parametrize(("successes", "n"), [(2, 1), (101, 100), (-1, 3)])
def test_more_than_all_is_no_share(successes, n):
    with pytest.raises(ValueError, match=f"{successes} of {n} is no share"):
        share(successes, n)
