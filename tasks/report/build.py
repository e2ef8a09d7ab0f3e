"""A comparison as files: JSON for programs, Markdown for Prefect, one HTML page for people, figures beside them."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tasks.contracts.comparison import FAULT_TITLES, FAULTS, ChampionFigures, ComparedExample, Comparison
from tasks.contracts.files import publish_folder, write_json, write_text
from tasks.contracts.measurements import Measurements
from tasks.contracts.suite import SuiteFigures
from tasks.pages.figures import FINETUNED, ORIGINAL, curve, exact_match_bars
from tasks.pages.page import render_page
from tasks.report.diff import marked
from tasks.report.document import ReportDocument, as_json
from tasks.report.markdown import KINDS, comparison_markdown, gate_figure

CURVES = {
    "train/loss": "training loss",
    "train/tokens_per_s_per_gpu": "tokens per second and rank",
    "train/learning_rate": "learning rate",
    "train/grad_norm": "gradient norm",
    "gpu/utilization": "GPU use",
    "gpu/memory_share": "GPU memory held",
}
MAX_EXAMPLES_SHOWN = 400
"""On the page, of each outcome; all are in comparison.json."""


@dataclass(frozen=True)
class ReportInputs:
    """What a report is made of besides the comparison.

    Attributes:
        points: ``(step, metrics)`` of the training run, in order.
        provenance: settings, digests and versions.
        suite: a public benchmark that was asked as well.
        champion: the registry's champion, where it was asked the same.
    """

    run: str
    model: str
    dataset: str
    quality: Mapping[str, Any]
    training: Mapping[str, Any]
    points: Sequence[tuple[int, Mapping[str, float]]]
    provenance: Mapping[str, Any]
    measured: Measurements
    suite: SuiteFigures | None = None
    champion: ChampionFigures | None = None


def build_report(comparison: Comparison, inputs: ReportInputs, folder: Path) -> None:
    """Write ``comparison.json``, ``.md``, ``.html`` and ``figures/`` into ``folder``, whole or not at all."""
    document = ReportDocument.of(
        comparison,
        run=inputs.run,
        model=inputs.model,
        dataset=inputs.dataset,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        measured=inputs.measured,
        training=dict(inputs.training),
        quality=dict(inputs.quality),
        provenance=dict(inputs.provenance),
        suite=inputs.suite,
        champion=inputs.champion,
    )
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    (temporary / "figures").mkdir(parents=True)
    curves = {name: svg for name in CURVES if (svg := _curve(name, inputs.points))}
    write_text(temporary / "figures" / "exact_match.svg", _standalone(exact_match_bars(comparison.groups)))
    for name, svg in curves.items():
        write_text(temporary / "figures" / f"{name.replace('/', '_')}.svg", _standalone(svg))
    write_json(temporary / "comparison.json", as_json(document))
    write_text(temporary / "comparison.md", comparison_markdown(document))
    write_text(temporary / "comparison.html", comparison_page(document, list(curves.values())))
    publish_folder(temporary, folder)


def comparison_page(document: ReportDocument, curves: Sequence[str]) -> str:
    """The page for people.

    Args:
        curves: of the training run, as SVG.
    """
    counts = Counter(example.kind for example in document.examples)
    shown = [e for kind in KINDS for e in [e for e in document.examples if e.kind == kind][:MAX_EXAMPLES_SHOWN]]
    faults = [
        (FAULT_TITLES[fault], before, after)
        for fault in FAULTS
        if (before := _faults(document, "original", fault)) + (after := _faults(document, "finetuned", fault))
    ]
    quality = document.quality
    return render_page(
        "comparison.html",
        document=document,
        gates=[(gate, *gate_figure(gate)) for gate in document.gates],
        curves=[Markup(svg) for svg in curves],  # noqa: S704 - drawn by us
        colours={"original": ORIGINAL, "finetuned": FINETUNED},
        faults=faults,
        most_faults=max((max(before, after) for _, before, after in faults), default=1),
        training_note=training_note(document.training),
        rejected=_counts(quality["rows"]["rejected"]),
        left_out=_counts(quality["rows"]["left_out"]),
        kinds=[(kind, counts[kind]) for kind in KINDS if counts[kind]],
        categories=sorted({_category(e) for e in document.examples}),
        examples=[(e, _category(e), *_answers(e)) for e in shown],
        num_hidden=len(document.examples) - len(shown),
        provenance=json.dumps(document.provenance, indent=2, sort_keys=True),
    )


def training_note(training: Mapping[str, Any]) -> str:
    """The training run in a sentence."""
    return (
        f"{training['total_steps']} optimiser steps on {training['world_size']} ranks, "
        f"{training['trainable_parameters']:,} trainable parameters, loss {training['final_loss']:.3f} at the end, "
        f"{training['tokens_per_s_per_gpu']:.0f} tokens per second and rank (median, padding not counted), "
        f"{training['peak_memory_gbytes']:.1f} GB at most on rank 0."
    )


def _faults(document: ReportDocument, model: str, fault: str) -> int:
    """Over all requests: those needing a call, those without, and those of unseen tools are disjoint."""
    disjoint = [g for g in document.groups if g.name in ("needs_call", "no_fitting_tool", "unseen_tools")]
    return sum(getattr(group, model).faults.get(fault, 0) for group in disjoint)


def _category(example: ComparedExample) -> str:
    name = example.category.replace("_", " ")
    return f"{name}, unseen tools" if example.slice == "unseen_tools" else name


@dataclass(frozen=True)
class _Answer:
    """One model's answer as the page shows it: the expected calls and what was read, differences marked."""

    who: str
    colour: str
    reason: str
    is_right: bool
    expected: Markup
    given: Markup
    text: str


def _answers(example: ComparedExample) -> tuple[_Answer, _Answer]:
    def answer(who: str, colour: str, reason: str, calls: str, text: str, is_right: bool) -> _Answer:
        expected, given = marked(example.expected, calls) if calls else (Markup.escape(example.expected), Markup(""))
        # A text that is nothing but the calls read from it says nothing more.
        return _Answer(who, colour, reason, is_right, expected, given, text)

    kind = example.kind
    return (
        answer("original model", ORIGINAL, example.original_reason, example.original_calls, example.original,
               kind in ("broken", "kept")),
        answer("fine-tuned model", FINETUNED, example.finetuned_reason, example.finetuned_calls, example.finetuned,
               kind in ("fixed", "kept")),
    )  # fmt: skip


def _curve(name: str, points: Sequence[tuple[int, Mapping[str, float]]]) -> str:
    known = [(step, metrics[name]) for step, metrics in points if name in metrics]
    return curve([step for step, _ in known], [value for _, value in known], CURVES[name]) if known else ""


def _standalone(svg: str) -> str:
    """An SVG file that has no page to take its colour from."""
    return '<?xml version="1.0" encoding="utf-8"?>\n' + svg.replace("currentColor", "#1b2330")


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in sorted(counts.items())) or "none"
