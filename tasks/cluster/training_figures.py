"""What the training program's runs say together: speed of each width, scaling, and the same loss twice."""

import math
import statistics
from collections.abc import Mapping, Sequence

from tasks.contracts.cluster_report import Figure

Points = Sequence[tuple[int, Mapping[str, float]]]
LOSS, SPEED, WORK = "train/loss", "train/tokens_per_s_per_gpu", "train/useful_tflops_per_s_per_gpu"
WORK_OF_RANK = "rank/{:03d}/work_us_per_token"


def training_figures(runs: Mapping[str, Points], product_tflops: float | None) -> list[Figure]:
    """Figures of the runs ``one``, ``node`` (where nodes have several ranks), ``all`` and ``repeat``.

    Args:
        runs: ``(step, metrics)`` of each; one that did not end has no entry.
        product_tflops: the slowest device's matrix product in the precision of training, TFLOP/s; None: not measured.
    """
    speeds = {name: _settled(points, SPEED) for name, points in runs.items()}
    figures = [Figure(name="training_tokens_per_s_per_gpu", value=speeds["all"])] if "all" in speeds else []
    figures += [
        Figure(name=f"training_{name}_tokens_per_s_per_gpu", value=speeds[name])
        for name in ("one", "node")
        if name in speeds
    ]
    whole, one = speeds.get("all"), speeds.get("one")
    if whole is not None and one is not None:
        figures.append(Figure(name="training_scaling_efficiency", value=whole / one))
    work = _settled(runs.get("all", ()), WORK)
    if work is not None and product_tflops:
        figures.append(Figure(name="training_share_of_product_rate", value=work / product_tflops))
    first, second = (_losses(runs.get(name, ())) for name in ("all", "repeat"))
    if first and second:
        same_steps = first.keys() == second.keys()
        differences = [abs(first[step] - second[step]) for step in sorted(first)] if same_steps else [math.nan]
        # max() hides a NaN or not by its place.
        apart = math.nan if any(map(math.isnan, differences)) else max(differences)
        figures.append(Figure(name="training_first_loss_difference", value=differences[0]))
        figures.append(Figure(name="training_loss_difference", value=apart))
        figures.append(Figure(name="training_final_loss", value=first[max(first)]))
    return figures


def work_of_ranks(points: Points, num_ranks: int) -> list[Figure]:
    """What each rank took for its own part of a step, by the ranks' numbers; None where it was not told."""
    values = [_settled(points, WORK_OF_RANK.format(rank)) for rank in range(num_ranks)]
    return [Figure(name="training_work_us_per_token", value=value) for value in values]


def _settled(points: Points, name: str) -> float | None:
    """A metric's median without the first quarter of the steps."""
    values = [metrics[name] for _, metrics in points if name in metrics]
    counted = values[max(1, len(values) // 4) :]
    return statistics.median(counted) if counted else None


def _losses(points: Points) -> dict[int, float]:
    return {step: metrics[LOSS] for step, metrics in points if LOSS in metrics}
