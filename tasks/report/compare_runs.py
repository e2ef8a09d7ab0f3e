"""Several finished runs side by side: what each came to, which is better beyond chance, and in what their settings differ."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tasks.contracts.comparison import PairedDifference
from tasks.contracts.overrides import dotted
from tasks.evaluation.statistics import holm, is_improvement, paired_difference
from tasks.pages.figures import FINETUNED, ORIGINAL
from tasks.pages.page import render_page
from tasks.report.document import NotAReport, ReportDocument
from tasks.report.markdown import p_value, percent

ALPHA = 0.05
RIGHT = {"original": ("kept", "broken"), "finetuned": ("kept", "fixed")}
FREE_SETTINGS = ("storage.",)
"""Settings that differ between runs and change nothing that is measured."""


@dataclass(frozen=True)
class AgainstFirst:
    """A run's fine-tuned model against the first run's, on the same requests needing a call.

    Attributes:
        paired: this run's minus the first's; None where their test sets differ, which ``reason`` says.
        p_value_holm: corrected for the number of runs.
    """

    paired: PairedDifference | None
    p_value_holm: float | None
    is_better: bool
    reason: str


@dataclass(frozen=True)
class RunComparison:
    """Runs in the order asked for; ``against_first`` of the first itself is None."""

    runs: tuple[ReportDocument, ...]
    against_first: tuple[AgainstFirst | None, ...]
    differing_settings: Mapping[str, tuple[str, ...]]


def compare_runs(documents: Sequence[ReportDocument]) -> RunComparison:
    """Compare finished runs.

    Raises:
        NotAReport: the same run twice.
    """
    names = [d.run for d in documents]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise NotAReport(f"run {twice[0]} is named twice; each run once")
    first, *others = documents
    paired = [_paired(first, other) for other in others]
    corrected = holm([p.p_value if p else None for p in paired])
    against = [
        AgainstFirst(p, q, q is not None and p is not None and is_improvement(p, ALPHA) and q < ALPHA, "")
        if p
        else AgainstFirst(None, None, False, f"other test requests than {first.run}: not paired")
        for p, q in zip(paired, corrected, strict=True)
    ]
    return RunComparison(tuple(documents), (None, *against), _differing(documents))


def _paired(first: ReportDocument, other: ReportDocument) -> PairedDifference | None:
    """None unless both were asked the same requests with the same expected answers."""
    before, after = _right(first), _right(other)
    if before.keys() != after.keys():
        return None
    both = [key for key in before if before[key] is not None and after[key] is not None]
    return paired_difference(
        [bool(before[key]) for key in both], [bool(after[key]) for key in both], [key[1] for key in both]
    )  # fmt: skip


def _right(document: ReportDocument) -> dict[tuple[str, str, str], bool | None]:
    """Whether the fine-tuned model was right, by request; None: not scored."""
    return {
        (e.example_id, e.cluster, e.expected): None if e.kind == "unscored" else e.kind in RIGHT["finetuned"]
        for e in document.examples
        if e.slice == "test" and e.category != "no_fitting_tool"
    }


def _differing(documents: Sequence[ReportDocument]) -> dict[str, tuple[str, ...]]:
    settings = [dotted(d.provenance.get("settings", {})) for d in documents]
    names = sorted({name for each in settings for name in each if not name.startswith(FREE_SETTINGS)})
    values = {name: tuple(str(each.get(name, "–")) for each in settings) for name in names}
    return {name: each for name, each in values.items() if len(set(each)) > 1}


def runs_as_json(comparison: RunComparison) -> Any:
    """For programs: figures of each run, without its examples."""
    return {
        "runs": [
            {"run": d.run, "passed": d.passed, "statement": d.statement, "groups": [asdict(g) for g in d.groups],
             "measured": asdict(d.measured)}
            for d in comparison.runs
        ],
        "against_first": [None if a is None else asdict(a) for a in comparison.against_first],
        "differing_settings": {name: list(values) for name, values in comparison.differing_settings.items()},
    }  # fmt: skip


def rows_of(comparison: RunComparison) -> list[tuple[str, list[str]]]:
    """What the runs are compared by: a name, and each run's figure as text."""

    def row(name: str, text: Any) -> tuple[str, list[str]]:
        return name, [text(d) for d in comparison.runs]

    def number(value: float | None, pattern: str) -> str:
        return "–" if value is None else pattern.format(value)

    def group(document: ReportDocument, name: str) -> Any:
        return next(g for g in document.groups if g.name == name)

    rows = [
        row("verdict", lambda d: "PASS" if d.passed else "FAIL"),
        row("model", lambda d: d.model),
        row("dataset", lambda d: d.dataset),
        row("requests needing a call", lambda d: str(d.groups[0].n)),
        row("exact match, original", lambda d: percent(d.groups[0].original.exact_match.value)),
        row("exact match, fine-tuned", lambda d: percent(d.groups[0].finetuned.exact_match.value)),
        row("95 % interval", lambda d: f"{percent(d.groups[0].finetuned.exact_match.low)} to "
            f"{percent(d.groups[0].finetuned.exact_match.high)}"),
        row("call rate, fine-tuned", lambda d: percent(d.groups[0].finetuned.call_rate.value)),
        row("abstention, fine-tuned", lambda d: percent(group(d, "no_fitting_tool").finetuned.exact_match.value)),
        row("unseen tools, fine-tuned", lambda d: percent(group(d, "unseen_tools").finetuned.exact_match.value)),
        row("training loss at the end", lambda d: number(d.measured.final_loss, "{:.3f}")),
        row("training tokens/s per rank", lambda d: number(d.measured.tokens_per_s_per_gpu, "{:,.0f}")),
        row("loss on plain conversations", lambda d: "–" if d.measured.plain_loss_increase is None
            else f"{100 * d.measured.plain_loss_increase:+.1f} %"),
        row("GPU-hours", lambda d: number(d.measured.gpu_hours, "{:.2f}")),
        row("hours from first job to last", lambda d: number(d.measured.wall_hours, "{:.2f}")),
    ]  # fmt: skip
    against = []
    for entry in comparison.against_first:
        if entry is None:
            against.append("(compared with)")
        elif entry.paired is None or entry.paired.difference is None:
            against.append(entry.reason or "nothing scored by both")
        else:
            better = ", better" if entry.is_better else ""
            against.append(
                f"{100 * entry.paired.difference:+.1f} points ({100 * (entry.paired.low or 0):+.1f} to "
                f"{100 * (entry.paired.high or 0):+.1f}), p = {p_value(entry.p_value_holm)}{better}"
            )
    return [*rows, (f"fine-tuned against {comparison.runs[0].run}'s", against)]


def runs_markdown(comparison: RunComparison) -> str:
    """The table, then the settings that differ."""
    names = [d.run for d in comparison.runs]
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    lines += [f"| {name} | " + " | ".join(values) + " |" for name, values in rows_of(comparison)]
    if comparison.differing_settings:
        lines += ["", "| setting that differs | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
        for name, values in comparison.differing_settings.items():
            lines.append(f"| {name} | " + " | ".join(v.replace("|", "\\|") for v in values) + " |")
    return "\n".join(lines) + "\n"


def runs_page(comparison: RunComparison) -> str:
    """The page for people."""
    return render_page(
        "runs.html",
        comparison=comparison,
        rows=rows_of(comparison),
        colours={"original": ORIGINAL, "finetuned": FINETUNED},
    )
