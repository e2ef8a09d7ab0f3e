"""A comparison as files: JSON for programs, Markdown for Prefect, one HTML page for people, figures beside them."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tasks.contracts.comparison import Comparison
from tasks.contracts.files import publish_folder, write_json, write_text
from tasks.pages.figures import FINETUNED, ORIGINAL, curve, exact_match_bars
from tasks.pages.page import render_page

KINDS = ("fixed", "broken", "still wrong", "kept", "unscored")
CURVES = {
    "train/loss": "training loss",
    "train/tokens_per_s_per_gpu": "tokens per second and rank",
}


@dataclass(frozen=True)
class ReportInputs:
    """What a report is made of besides the comparison.

    Attributes:
        points: ``(step, metrics)`` of the training run, in order.
        provenance: settings, digests and versions.
    """

    run: str
    model: str
    dataset: str
    quality: Mapping[str, Any]
    training: Mapping[str, Any]
    points: Sequence[tuple[int, Mapping[str, float]]]
    provenance: Mapping[str, Any]


def build_report(comparison: Comparison, inputs: ReportInputs, folder: Path) -> None:
    """Write ``comparison.json``, ``.md``, ``.html`` and ``figures/`` into ``folder``, whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    (temporary / "figures").mkdir(parents=True)
    bars = exact_match_bars(comparison.groups)
    curves = {name: _curve(name, inputs.points) for name in CURVES}
    write_text(temporary / "figures" / "exact_match.svg", _standalone(bars))
    for name, svg in curves.items():
        write_text(temporary / "figures" / f"{name.replace('/', '_')}.svg", _standalone(svg))
    write_json(
        temporary / "comparison.json",
        asdict(comparison) | {"run": inputs.run, "provenance": inputs.provenance, "training": inputs.training},
    )
    write_text(temporary / "comparison.md", comparison_markdown(comparison, inputs))
    write_text(temporary / "comparison.html", _html(comparison, inputs, bars, list(curves.values())))
    publish_folder(temporary, folder)


def comparison_markdown(comparison: Comparison, inputs: ReportInputs) -> str:
    """The comparison as Markdown, verdict first."""
    lines = [
        f"# {'PASS' if comparison.passed else 'FAIL'}: {inputs.run}",
        "",
        comparison.statement,
        "",
        "| gate | measured | threshold | |",
        "|---|---:|---:|---|",
    ]
    for gate in comparison.gates:
        value = "missing" if gate.value is None else f"{gate.value:.4g}"
        sign = "<" if gate.name.startswith("max") else ">="
        result = "pass" if gate.passed else "**FAIL**"
        lines.append(f"| {gate.description} | {value} | {sign} {gate.threshold:.4g} | {result} |")
    lines += [
        "",
        "| requests | n | original | fine-tuned | difference | p | call rate, fine-tuned | unscored |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for group in comparison.groups:
        before, after, paired = group.original, group.finetuned, group.paired
        cells = [
            group.title,
            str(group.n),
            _percent(before.exact_match.value),
            _percent(after.exact_match.value),
            "–" if paired.difference is None else f"{100 * paired.difference:+.1f} points",
            "–" if paired.p_value is None else f"{paired.p_value:.2g}",
            _percent(after.call_rate.value),
            str(before.num_unscored + after.num_unscored),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    counts = Counter(example.kind for example in comparison.examples)
    lines += ["", ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind]) + ".", ""]
    for kind in ("fixed", "broken", "still wrong"):
        for example in [e for e in comparison.examples if e.kind == kind][:2]:
            lines += [
                f"**{kind}**: {_inline(example.request)}",
                "",
                f"- expected `{_inline(example.expected)}`",
                f"- original `{_inline(example.original)}` ({_inline(example.original_reason)})",
                f"- fine-tuned `{_inline(example.finetuned)}` ({_inline(example.finetuned_reason)})",
                "",
            ]
    return "\n".join(lines)


def _html(comparison: Comparison, inputs: ReportInputs, bars: str, curves: Sequence[str]) -> str:
    counts = Counter(example.kind for example in comparison.examples)
    training = inputs.training
    note = (
        f"{training['total_steps']} optimiser steps on {training['world_size']} ranks, "
        f"{training['trainable_parameters']:,} trainable parameters, loss {training['final_loss']:.3f} at the end, "
        f"{training['tokens_per_s_per_gpu']:.0f} tokens per second and rank (median, padding not counted), "
        f"{training['peak_memory_gbytes']:.1f} GB at most on rank 0."
    )
    return render_page(
        "comparison.html",
        comparison=comparison,
        run=inputs.run,
        model=inputs.model,
        dataset=inputs.dataset,
        finished=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        bars=Markup(bars),  # noqa: S704 - drawn by us
        curves=[Markup(svg) for svg in curves if svg],  # noqa: S704 - drawn by us
        colours={"original": ORIGINAL, "finetuned": FINETUNED},
        training_note=note,
        quality=inputs.quality,
        rejected=_counts(inputs.quality["rows"]["rejected"]),
        left_out=_counts(inputs.quality["rows"]["left_out"]),
        kinds=[(kind, counts[kind]) for kind in KINDS if counts[kind]],
        provenance=json.dumps(inputs.provenance, indent=2, sort_keys=True),
    )


def _curve(name: str, points: Sequence[tuple[int, Mapping[str, float]]]) -> str:
    known = [(step, metrics[name]) for step, metrics in points if name in metrics]
    return curve([step for step, _ in known], [value for _, value in known], CURVES[name])


def _standalone(svg: str) -> str:
    """An SVG file that has no page to take its colour from."""
    return '<?xml version="1.0" encoding="utf-8"?>\n' + svg.replace("currentColor", "#1b2330")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "none"


def _inline(text: str) -> str:
    """Text that cannot break out of a line, a table cell or a code span."""
    text = " ".join(text.replace("`", "'").replace("|", "\\|").split())
    return text if len(text) <= 300 else text[:297] + "..."
