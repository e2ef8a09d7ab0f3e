"""The statistics behind every claim: intervals for shares, and paired tests for the difference of two models."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest, norm

from tasks.contracts.comparison import PairedDifference, Share

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000


def share(successes: int, n: int) -> Share:
    """A share with its Wilson score interval (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    if n == 0:
        return Share(0, 0, None, None, None)
    z = float(norm.ppf(0.5 + CONFIDENCE / 2))
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Share(successes, n, p, max(0.0, centre - half), min(1.0, centre + half))


def paired_difference(original: Sequence[bool], finetuned: Sequence[bool], seed: int = 0) -> PairedDifference:
    """Fine-tuned minus original on the same examples.

    The p-value is the exact two-sided McNemar test: under no difference, each discordant pair falls either way with
    probability 1/2 (McNemar 1947, doi:10.1007/BF02295996). The interval is the paired percentile bootstrap.

    Args:
        original: whether each example was right, shape (n,).
        finetuned: the same for the other model, same order.

    Raises:
        ValueError: the two differ in length.
    """
    if len(original) != len(finetuned):
        raise ValueError(f"paired figures need the same examples, got {len(original)} and {len(finetuned)}")
    n = len(original)
    if n == 0:
        return PairedDifference(0, None, None, None, None, 0, 0)
    before, after = np.asarray(original, dtype=int), np.asarray(finetuned, dtype=int)
    fixed, broken = int(((after == 1) & (before == 0)).sum()), int(((after == 0) & (before == 1)).sum())
    p_value = float(binomtest(fixed, fixed + broken, 0.5).pvalue) if fixed + broken else 1.0
    # Resampling pairs is drawing the counts of +1, 0 and -1 differences from a multinomial.
    draws = np.random.default_rng(seed).multinomial(
        n, [fixed / n, broken / n, 1 - (fixed + broken) / n], size=NUM_RESAMPLES
    )
    differences = (draws[:, 0] - draws[:, 1]) / n
    low, high = np.quantile(differences, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return PairedDifference(n, (fixed - broken) / n, float(low), float(high), p_value, fixed, broken)
