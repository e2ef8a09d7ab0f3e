"""Figures as SVG that stands inside a page: text and axes take the page's own colour, so light and dark both work."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from tasks.contracts.comparison import GroupFigures, Share

matplotlib.rcParams["svg.fonttype"] = "none"
matplotlib.rcParams["svg.hashsalt"] = "proving-ground"
matplotlib.rcParams["font.family"] = "sans-serif"
matplotlib.rcParams["font.sans-serif"] = ["DejaVu Sans"]

INK = "#010203"
"""Replaced by ``currentColor`` in the SVG: the page decides."""
ORIGINAL = "#9aa4b2"
FINETUNED = "#2f7ed8"


def exact_match_bars(groups: Sequence[GroupFigures]) -> str:
    """Exact match of both models per group, with 95 % intervals, as SVG."""
    shown = [group for group in groups if group.n]
    figure = Figure(figsize=(8.4, 0.78 * len(shown) + 0.9), layout="constrained")
    axes = figure.subplots()
    height = 0.36
    for position, group in enumerate(shown):
        for offset, share, colour in (
            (-height / 2, group.original.exact_match, ORIGINAL),
            (height / 2, group.finetuned.exact_match, FINETUNED),
        ):
            _bar(axes, position + offset, share, height, colour)
    axes.set_yticks(range(len(shown)), [f"{group.title}\nn = {group.n}" for group in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xlabel("answered exactly as expected")
    return _svg(figure)


def curve(steps: Sequence[int], values: Sequence[float], label: str) -> str:
    """One measured value over optimiser steps, as SVG."""
    figure = Figure(figsize=(4.1, 2.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, values, color=FINETUNED, linewidth=2)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    return _svg(figure)


def histogram(named: Mapping[str, npt.NDArray[Any]], label: str, share: str) -> str:
    """Distributions of one measure over several groups, each adding up to one, as SVG."""
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(0, max((float(max(values)) for values in named.values()), default=1.0), 41)
    for (name, values), colour in zip(named.items(), (FINETUNED, ORIGINAL, "#d98c2b"), strict=False):
        counts, _ = np.histogram(values, edges)
        axes.stairs(counts / len(values), edges, linewidth=2, color=colour, label=name)
    axes.set_xlabel(label)
    axes.set_ylabel(share)
    axes.set_xlim(left=0)
    legend = axes.legend(frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_color(INK)
    return _svg(figure)


def _bar(axes: matplotlib.axes.Axes, position: float, share: Share, height: float, colour: str) -> None:
    if share.value is None or share.low is None or share.high is None:
        axes.text(0.01, position, "not scored", va="center", fontsize=9, color=INK)
        return
    # Rounding may put an end of the interval a hair inside the value.
    error = [[max(0.0, share.value - share.low)], [max(0.0, share.high - share.value)]]
    axes.barh(position, share.value, height=height * 0.92, color=colour)
    axes.errorbar(share.value, position, xerr=error, color=INK, capsize=3, linewidth=1)
    axes.text(share.high + 0.015, position, f"{share.value:.0%}", va="center", fontsize=9, color=INK)


def _svg(figure: Figure) -> str:
    for axes in figure.axes:
        axes.tick_params(colors=INK, labelsize=9)
        axes.xaxis.label.set(color=INK, fontsize=9)
        axes.yaxis.label.set(color=INK, fontsize=9)
        axes.grid(axis="both" if axes.lines else "x", color=INK, alpha=0.12)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(INK)
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue().replace(INK, "currentColor")
    return svg[svg.index("<svg") :]
