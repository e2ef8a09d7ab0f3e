"""A comparison as Markdown, for Prefect's artifacts and for pull requests."""

from collections import Counter

from tasks.contracts.comparison import Gate
from tasks.report.document import ReportDocument

KINDS = ("fixed", "broken", "still wrong", "kept", "unscored")
"""What became of a request, in the order in which people want to see it."""


def gate_figure(gate: Gate) -> tuple[str, str]:
    """Measured value and threshold, both with their unit."""

    def text(value: float) -> str:
        if gate.unit == "%":
            return f"{value:.1%}"
        return f"{value:,.4g}" + (f" {gate.unit}" if gate.unit else "")

    sign = {">=": "≥", "<": "<", "<=": "≤"}[gate.relation]
    return "missing" if gate.value is None else text(gate.value), f"{sign} {text(gate.threshold)}"


def comparison_markdown(document: ReportDocument) -> str:
    """The verdict first, then gates, groups, cost, and a few examples."""
    lines = [
        f"# {'PASS' if document.passed else 'FAIL'}: {document.run}",
        "",
        document.statement,
        *(["", " ".join(document.champion.statement.split())] if document.champion else []),
        "",
        "| gate | measured | threshold | |",
        "|---|---:|---:|---|",
    ]
    for gate in document.gates:
        value, threshold = gate_figure(gate)
        lines.append(f"| {gate.description} | {value} | {threshold} | {'pass' if gate.passed else '**FAIL**'} |")
    lines += [
        "",
        "| requests | n | original | fine-tuned | difference | p | p, Holm | call rate, fine-tuned | unscored |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for group in document.groups:
        before, after, paired = group.original, group.finetuned, group.paired
        cells = [
            group.title,
            str(group.n),
            percent(before.exact_match.value),
            percent(after.exact_match.value),
            "–" if paired.difference is None else f"{100 * paired.difference:+.1f} points",
            p_value(paired.p_value),
            p_value(group.p_value_holm),
            percent(after.call_rate.value),
            str(before.num_unscored + after.num_unscored),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *_cost(document)]
    lines += _suite(document)
    counts = Counter(example.kind for example in document.examples)
    lines += ["", ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind]) + ".", ""]
    for kind in ("fixed", "broken", "still wrong"):
        for example in [e for e in document.examples if e.kind == kind][:2]:
            lines += [
                f"**{kind}**: {_inline(example.request)}",
                "",
                f"- expected `{_inline(example.expected)}`",
                f"- original `{_inline(example.original)}` ({_inline(example.original_reason)})",
                f"- fine-tuned `{_inline(example.finetuned)}` ({_inline(example.finetuned_reason)})",
                "",
            ]
    return "\n".join(lines)


def _cost(document: ReportDocument) -> list[str]:
    measured = document.measured
    if measured.wall_hours is None:
        return []
    if measured.gpu_hours is not None:
        return [f"{measured.gpu_hours:.2f} GPU-hours, {measured.wall_hours:.2f} h from first job to last."]
    return [
        f"{measured.process_hours:.2f} process-hours without GPUs, {measured.wall_hours:.2f} h from first job to last."
    ]


def _suite(document: ReportDocument) -> list[str]:
    if document.suite is None:
        return []
    lines = [
        "",
        "| BFCL | n | original | fine-tuned | by its checker | | agreement |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for category in document.suite.categories:
        before, after = category.original, category.finetuned
        checker = f"{percent(before.checker.value)} | {percent(after.checker.value)}"
        lines.append(
            f"| {category.name.replace('_', ' ')} | {category.n} | {percent(before.exact.value)} | "
            f"{percent(after.exact.value)} | {checker} | {percent(after.agreement.value)} |"
        )
    return lines


def percent(value: float | None) -> str:
    """A share for people."""
    return "–" if value is None else f"{value:.1%}"


def p_value(value: float | None) -> str:
    """A p-value for people."""
    return "–" if value is None else f"{value:.2g}"


def _inline(text: str) -> str:
    """Text that cannot break out of a line, a table cell or a code span."""
    text = " ".join(text.replace("`", "'").replace("|", "\\|").split())
    return text if len(text) <= 300 else text[:297] + "..."
