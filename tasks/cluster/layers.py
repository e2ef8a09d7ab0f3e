"""The three layers by which a figure is judged: what is physically expected, the rest of the fleet, its own history."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tasks.contracts.cluster_settings import ThresholdSettings

Better = Literal["higher", "lower"]
MAD_TO_DEVIATION = 1.4826
"""The median absolute deviation of a normal distribution times this is its standard deviation."""
FEWEST_FOR_MAD = 4
"""With fewer than these a median absolute deviation says nothing; the worse is then held against the best."""


@dataclass(frozen=True)
class Outlier:
    """A value that falls off.

    Attributes:
        typical: what it was held against.
        worse_by: share by which it is worse, 0.5: half as good.
    """

    place: str
    value: float
    typical: float
    worse_by: float


def is_number(value: float | None) -> bool:
    """Whether something was measured; NaN and infinity were not."""
    return value is not None and math.isfinite(value)


def better_of(name: str) -> Better:
    """Whether a figure should be high or low, by the unit in its name."""
    lower = name.endswith(
        ("_s", "_ms", "_celsius", "_share", "_bytes", "_per_processor", "lateness_s", "difference", "_us_per_token")
    )
    is_rate = name.endswith(("_per_s", "_per_s_per_gpu", "_of_product_rate"))
    return "lower" if lower and not is_rate else "higher"


def misses(value: float, limit: float, better: Better) -> bool:
    """Whether a value is on the wrong side of a limit."""
    return value < limit if better == "higher" else value > limit


def worse_by(value: float, typical: float, better: Better) -> float:
    """Share by which a value is worse than the typical one, as a rate: 0 as good, 0.5 half as good, 1 nothing."""
    good, bad = (typical, value) if better == "higher" else (value, typical)
    return 0.0 if good <= 0 else 1 - bad / good


def outliers(values: Mapping[str, float], better: Better, thresholds: ThresholdSettings) -> list[Outlier]:
    """Places whose value is worse than the fleet's by the minimum effect and, where there are enough, by its spread.

    Of two or three the best stands for the fleet: which of two is off cannot be told otherwise, and the worse is named. Of more
    the median does, and where the worse half is a group of its own, the better half's: one of two nodes may be slow as a whole.
    """
    if len(values) < 2:
        return []
    numbers = list(values.values())
    if len(numbers) < FEWEST_FOR_MAD:
        typical, spread = (max if better == "higher" else min)(numbers), 0.0
    else:
        typical, spread = _spread(numbers)
    found = []
    for place, value in values.items():
        effect = worse_by(value, typical, better)
        if effect > thresholds.fleet_effect and abs(value - typical) > thresholds.fleet_deviations * spread:
            found.append(Outlier(place, value, typical, effect))
    known = {outlier.place for outlier in found}
    found += [outlier for outlier in _worse_group(values, better, thresholds) if outlier.place not in known]
    return sorted(found, key=lambda outlier: -outlier.worse_by)


def _worse_group(values: Mapping[str, float], better: Better, thresholds: ThresholdSettings) -> list[Outlier]:
    """The worse half or less, where a gap parts it from the others that is wide beside how these differ among themselves.

    Median and median deviation say nothing of halves: the one lies between them, and the other spans both.
    """
    ordered = sorted(values, key=lambda place: values[place], reverse=better == "higher")
    splits = range((len(ordered) + 1) // 2, len(ordered)) if len(ordered) >= FEWEST_FOR_MAD else ()
    gaps = {split: abs(values[ordered[split - 1]] - values[ordered[split]]) for split in splits}
    if not gaps:
        return []
    split = max(gaps, key=lambda split: gaps[split])
    good, bad = ordered[:split], ordered[split:]
    typical, spread = _spread([values[place] for place in good])
    is_parted = (
        worse_by(values[bad[0]], values[good[-1]], better) > thresholds.fleet_effect
        and gaps[split] > thresholds.fleet_deviations * spread
    )
    return [Outlier(p, values[p], typical, worse_by(values[p], typical, better)) for p in bad] if is_parted else []


def drift(value: float, history: Sequence[float], better: Better, thresholds: ThresholdSettings) -> float | None:
    """Share by which a value is worse than its own history; None: it is not, or there is too little of it."""
    known = [earlier for earlier in history if math.isfinite(earlier)]
    if len(known) < thresholds.min_history:
        return None
    typical, spread = _spread(known)
    effect = worse_by(value, typical, better)
    is_far = abs(value - typical) > thresholds.fleet_deviations * spread
    return effect if effect > thresholds.history_effect and is_far else None


def _spread(values: Sequence[float]) -> tuple[float, float]:
    middle = statistics.median(values)
    return middle, MAD_TO_DEVIATION * statistics.median(abs(value - middle) for value in values)
