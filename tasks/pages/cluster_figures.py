"""Figures of a cluster check as SVG: bandwidth by size against the reference, the matrix of all pairs, the last runs."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from tasks.pages.figures import FINETUNED, INK, ORIGINAL, _svg

COLOURS = (FINETUNED, "#d98c2b", "#3aa37a", "#9a63c9", "#d0517a", ORIGINAL)
Curve = Sequence[tuple[int, float]]
MAX_TICKS = 12
UNITS = ("B", "KiB", "MiB", "GiB")


def bandwidth_by_size(curves: Mapping[str, Curve], reference: Curve, floor: Curve, title: str) -> str:
    """Busbw in GB/s over message sizes in bytes, both logarithmic; the reference and the floor dashed, where there are any."""
    figure = Figure(figsize=(8.4, 3.9), layout="constrained")
    axes = figure.subplots()
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        axes.plot(*zip(*curve, strict=True), color=colour, linewidth=2, marker="o", markersize=4, label=name)
    if reference:
        axes.plot(
            *zip(*reference, strict=True),
            color=INK,
            linestyle="--",
            linewidth=1.4,
            alpha=0.7,
            label=f"reference: {title}",
        )
    if floor:
        axes.plot(
            *zip(*floor, strict=True), color=INK, linestyle="none", marker="_", markersize=14, label="floor of a gate"
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = _apart(sorted({size for curve in curves.values() for size, _ in curve}))
    axes.set_xticks(ticks, [size_label(size) for size in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("message")
    axes.set_ylabel("busbw, GB/s")
    # Bandwidth rises with the size: that corner is empty.
    legend = axes.legend(frameon=False, fontsize=9, loc="lower right")
    for text in legend.get_texts():
        text.set_color(INK)
    return _svg(figure)


def _apart(sizes: Sequence[int]) -> list[int]:
    """The sizes whose labels fit beside each other on a logarithmic axis, the largest among them."""
    gap = (sizes[-1] / sizes[0]) ** (1 / MAX_TICKS)
    kept = [sizes[-1]]
    for size in reversed(sizes):
        if size < kept[-1] and size * gap <= kept[-1]:
            kept.append(size)
    return kept[::-1]


def pair_matrix(places: Sequence[str], speeds: Mapping[tuple[str, str], float]) -> str:
    """GB/s from each place (row) to each other (column), as a heat map; a pair that was not measured is empty."""
    values = np.array([[speeds.get((source, target), np.nan) for target in places] for source in places], dtype=float)
    side = min(8.4, 1.9 + 0.46 * len(places))
    figure = Figure(figsize=(min(8.4, side + 1.6), side), layout="constrained")
    axes = figure.subplots()
    # Above the grid that every figure of ours has.
    image = axes.imshow(values, cmap="viridis", vmin=0, zorder=3)
    if len(places) <= 16:
        top = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                ink = "#ffffff" if value < 0.6 * top else "#10141b"
                axes.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=8, color=ink, zorder=4)
    step = max(1, len(places) // 16)
    ticks = list(range(0, len(places), step))
    axes.set_xticks(ticks, [places[i] for i in ticks], rotation=45, ha="right")
    axes.set_yticks(ticks, [places[i] for i in ticks])
    axes.set_xlabel("to")
    axes.set_ylabel("from")
    bar = figure.colorbar(image, ax=axes, label="GB/s", shrink=0.8)
    bar.outline.set_visible(False)
    return _svg(figure)


def trend(values: Sequence[float], label: str) -> str:
    """One figure over the last runs, oldest first."""
    figure = Figure(figsize=(4.1, 2.1), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1 - len(values), 1), values, color=FINETUNED, linewidth=2, marker="o", markersize=4)
    axes.set_xlabel("runs before this one")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{-value:g}" if value == int(value) else ""))
    return _svg(figure)


def size_label(size_bytes: float) -> str:
    """A size for an axis, ``64 KiB``."""
    unit = 0
    while size_bytes >= 1024 and unit < len(UNITS) - 1:
        size_bytes, unit = size_bytes / 1024, unit + 1
    return f"{size_bytes:.3g} {UNITS[unit]}"
