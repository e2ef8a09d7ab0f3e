"""The statistics behind every claim: intervals for shares, and paired tests for the difference of two models.

Requests that are not independent of each other, because a prompt stands twice or because several come from one conversation,
form a cluster. Tests and intervals then go by clusters; where every cluster is a single request they are the usual ones.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np

from tasks.contracts.comparison import PairedDifference, Share

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
NUM_RESAMPLES = 10_000
POWER = 0.8
"""Chance of seeing a difference that is there, of which :func:`requests_needed` speaks."""


def share(successes: int, n: int) -> Share:
    """A share with its Wilson score interval (Wilson 1927, doi:10.1080/01621459.1927.10502953).

    Raises:
        ValueError: there are more successes than there could be.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is no share")
    if n == 0:
        return Share(0, 0, None, None, None)
    p = successes / n
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return Share(successes, n, p, max(0.0, centre - half), min(1.0, centre + half))


def paired_difference(
    original: Sequence[bool], finetuned: Sequence[bool], clusters: Sequence[Hashable] | None = None, seed: int = 0
) -> PairedDifference:
    """Fine-tuned minus original on the same examples.

    Args:
        original: whether each example was right, shape (n,).
        finetuned: the same for the other model, same order.
        clusters: which examples belong together; None: each is independent of the others.

    Raises:
        ValueError: they differ in length.
    """
    if len(original) != len(finetuned) or (clusters is not None and len(clusters) != len(original)):
        num_clusters = len(original) if clusters is None else len(clusters)
        raise ValueError(
            f"paired figures need the same examples, got {len(original)} and {len(finetuned)} in {num_clusters} places"
        )
    n = len(original)
    if n == 0:
        return PairedDifference(0, 0, None, None, None, None, 0, 0)
    differences = [int(after) - int(before) for before, after in zip(original, finetuned, strict=True)]
    fixed, broken = differences.count(1), differences.count(-1)
    sums, sizes = _by_cluster(differences, clusters)
    low, high = _bootstrap(sums, sizes, seed)
    return PairedDifference(
        n, len(sums), (fixed - broken) / n, low, high, sign_flip_p_value(sums), fixed, broken
    )  # fmt: skip


def _by_cluster(differences: Sequence[int], clusters: Sequence[Hashable] | None) -> tuple[list[int], list[int]]:
    """Sum of the differences and number of examples of each cluster."""
    if clusters is None:
        return list(differences), [1] * len(differences)
    sums: Counter[Hashable] = Counter()
    for cluster, difference in zip(clusters, differences, strict=True):
        sums[cluster] += difference
    sizes = Counter(clusters)
    return [sums[cluster] for cluster in sizes], list(sizes.values())


def sign_flip_p_value(sums: Sequence[int]) -> float:
    """Exact two-sided p-value: under no difference, each cluster's sum is as likely with the other sign.

    The whole distribution is built up, one size of clusters after the other. Where every sum is -1, 0 or 1 this is the exact
    McNemar test, 2 x Binomial(min(b, c); b + c, 1/2) (McNemar 1947, doi:10.1007/BF02295996).
    """
    # Where runs are only deployed and watched there is no scipy, which is an eighth of such an image.
    from scipy.stats import binom

    probability = np.ones(1)
    for size, count in Counter(abs(s) for s in sums if s).items():
        # Of count sums of one size, k keep a plus: they add up to size * (2k - count).
        steps = np.zeros(2 * size * count + 1)
        steps[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        probability = np.convolve(probability, steps)
    zero, distance = len(probability) // 2, abs(sum(sums))
    if distance == 0:
        return 1.0
    return float(min(1.0, probability[: zero - distance + 1].sum() + probability[zero + distance :].sum()))


def _bootstrap(sums: Sequence[int], sizes: Sequence[int], seed: int) -> tuple[float, float]:
    """Percentile interval of the mean difference, whole clusters drawn with replacement.

    Drawing clusters is drawing how often each kind of cluster comes, from a multinomial.
    """
    kinds = Counter(zip(sums, sizes, strict=True))
    values = np.array(list(kinds), dtype=float)
    counts = np.array(list(kinds.values()), dtype=float)
    draws = np.random.default_rng(seed).multinomial(len(sums), counts / counts.sum(), size=NUM_RESAMPLES)
    differences = (draws @ values[:, 0]) / (draws @ values[:, 1])
    low, high = np.quantile(differences, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def is_improvement(paired: PairedDifference, alpha: float) -> bool:
    """Whether the fine-tuned model is better beyond chance: the test says so, and the interval lies above zero."""
    if paired.p_value is None or paired.low is None:
        return False
    return paired.p_value < alpha and paired.low > 0


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for being several (Holm 1979): the chance of any false claim among them stays below alpha.

    One that is missing stays so and counts for nothing.
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        corrected[i] = highest
    return corrected


def requests_needed(difference: float, discordant: float, alpha: float = 1 - CONFIDENCE, power: float = POWER) -> int:
    """How many independent requests show a difference of this size with the chance ``power`` (McNemar's test, two-sided).

    Connor 1987, doi:10.2307/2531961.

    Args:
        difference: of the shares of right answers, above 0.
        discordant: share of requests that exactly one model answers rightly, at least ``difference``.

    Raises:
        ValueError: no such two models exist.
    """
    if not 0 < difference <= discordant <= 1:
        raise ValueError(
            f"a difference of {difference:g} with {discordant:g} discordant requests is impossible; "
            "use 0 < difference <= discordant <= 1"
        )
    z_alpha, z_power = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)
    spread = math.sqrt(discordant - difference**2)
    return math.ceil(((z_alpha * math.sqrt(discordant) + z_power * spread) / difference) ** 2)
