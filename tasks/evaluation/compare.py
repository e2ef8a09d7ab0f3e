"""Scores of two models to a verdict."""

from collections.abc import Callable, Mapping, Sequence

from tasks.contracts.comparison import (
    ComparedExample,
    Comparison,
    Gate,
    GroupFigures,
    ModelFigures,
    Outcome,
    Score,
)
from tasks.contracts.conversation import CATEGORIES, Example, calls_to_json
from tasks.contracts.prediction import Prediction
from tasks.contracts.settings import GateSettings
from tasks.evaluation.scoring import score
from tasks.evaluation.statistics import paired_difference, share

ALPHA = 0.05
"""An improvement is claimed below this p-value, or below the run's own gate where that is stricter."""

PRIMARY = "needs_call"
TITLES = {
    PRIMARY: "Needs a call, tools seen in training",
    "one_call": "One tool offered, one call",
    "several_tools": "Several tools offered, one call",
    "parallel_calls": "Several calls at once",
    "no_fitting_tool": "No fitting tool: answer without a call",
    "unseen_tools": "Tools never seen in training",
}


def compare(
    examples: Sequence[Example],
    original: Sequence[Prediction],
    finetuned: Sequence[Prediction],
    gates: GateSettings,
    training: Mapping[str, float],
) -> Comparison:
    """Judge both models' predictions for the same examples.

    Args:
        training: figures of the training run that gates look at: ``final_loss``, ``tokens_per_s_per_gpu``.

    Raises:
        ValueError: predictions for other examples, or two for one example.
    """
    answers = {"original": _by_id(examples, original), "finetuned": _by_id(examples, finetuned)}
    scores = {
        model: {example.id: score(example, predictions.get(example.id)) for example in examples}
        for model, predictions in answers.items()
    }
    groups = tuple(
        _group(name, [e for e in examples if belongs(e)], scores["original"], scores["finetuned"])
        for name, belongs in _groups()
    )
    primary = groups[0]
    by_name = {group.name: group for group in groups}
    checked = _check_gates(gates, primary, by_name["no_fitting_tool"], training)
    alpha = min(ALPHA, gates.max_p_value or ALPHA)
    paired = primary.paired
    is_improvement = (
        paired.p_value is not None
        and paired.p_value < alpha
        and paired.low is not None
        and paired.low > 0
    )  # fmt: skip
    compared = tuple(
        _compared(e, scores["original"][e.id], scores["finetuned"][e.id], answers["original"], answers["finetuned"])
        for e in examples
    )
    return Comparison(
        passed=all(gate.passed for gate in checked),
        is_improvement=is_improvement,
        statement=_statement(primary, is_improvement, alpha),
        gates=checked,
        groups=groups,
        examples=compared,
    )


def _by_id(examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, Prediction]:
    known = {example.id for example in examples}
    ids = [prediction.example_id for prediction in predictions]
    if len(set(ids)) != len(ids):
        twice = sorted({i for i in ids if ids.count(i) > 1})
        raise ValueError(f"{len(twice)} examples have two predictions, e.g. {twice[0]}")
    if foreign := sorted(set(ids) - known):
        raise ValueError(f"{len(foreign)} predictions are for examples of another test set, e.g. {foreign[0]}")
    return {prediction.example_id: prediction for prediction in predictions}


def _groups() -> list[tuple[str, Callable[[Example], bool]]]:
    def category(name: str) -> Callable[[Example], bool]:
        return lambda example: example.slice == "test" and example.category == name

    return [
        (PRIMARY, lambda example: example.slice == "test" and bool(example.expected)),
        *((name, category(name)) for name in CATEGORIES),
        ("unseen_tools", lambda example: example.slice == "unseen_tools"),
    ]


def _group(
    name: str, examples: Sequence[Example], original: Mapping[str, Score], finetuned: Mapping[str, Score]
) -> GroupFigures:
    before, after = [original[e.id] for e in examples], [finetuned[e.id] for e in examples]
    pairs = [
        (b.outcome is Outcome.CORRECT, a.outcome is Outcome.CORRECT)
        for b, a in zip(before, after, strict=True)
        if Outcome.UNSCORED not in (b.outcome, a.outcome)
    ]
    return GroupFigures(
        name=name,
        title=TITLES[name],
        n=len(examples),
        original=_figures(before),
        finetuned=_figures(after),
        paired=paired_difference([b for b, _ in pairs], [a for _, a in pairs]),
    )


def _figures(scores: Sequence[Score]) -> ModelFigures:
    scored = [s for s in scores if s.outcome is not Outcome.UNSCORED]
    named = [s for s in scored if s.names_correct is not None]
    return ModelFigures(
        exact_match=share(sum(s.outcome is Outcome.CORRECT for s in scored), len(scored)),
        exact_match_lenient=share(sum(s.lenient_outcome is Outcome.CORRECT for s in scored), len(scored)),
        call_name=share(sum(bool(s.names_correct) for s in named), len(named)),
        arguments=share(sum(s.num_arguments_correct for s in scored), sum(s.num_arguments for s in scored)),
        parse_rate=share(sum(s.was_parsed for s in scored), len(scored)),
        call_rate=share(sum(s.has_call for s in scored), len(scored)),
        num_unscored=len(scores) - len(scored),
    )


def _check_gates(
    gates: GateSettings, primary: GroupFigures, no_tool: GroupFigures, training: Mapping[str, float]
) -> tuple[Gate, ...]:
    found: list[Gate] = []

    def at_least(name: str, description: str, value: float | None, threshold: float | None) -> None:
        if threshold is not None:
            found.append(Gate(name, description, value, threshold, value is not None and value >= threshold))

    def below(name: str, description: str, value: float | None, threshold: float | None) -> None:
        if threshold is not None:
            found.append(Gate(name, description, value, threshold, value is not None and value < threshold))

    tuned = primary.finetuned
    at_least("min_exact_match", "Exact match, fine-tuned, requests needing a call", tuned.exact_match.value,
             gates.min_exact_match)  # fmt: skip
    at_least("min_requests", "Scored requests needing a call", tuned.exact_match.n, gates.min_requests)
    # A significant loss is no success: the p-value counts only for a change upwards.
    is_up = (primary.paired.difference or 0) > 0
    below("max_p_value", "p-value of the improvement (exact McNemar)", primary.paired.p_value if is_up else 1.0,
          gates.max_p_value)  # fmt: skip
    at_least("min_call_rate", "Call rate, fine-tuned, requests needing a call", tuned.call_rate.value,
             gates.min_call_rate)  # fmt: skip
    at_least("min_abstention", "Abstention, fine-tuned, requests with no fitting tool",
             no_tool.finetuned.exact_match.value, gates.min_abstention)  # fmt: skip
    below("max_final_loss", "Training loss at the end", training.get("final_loss"), gates.max_final_loss)
    at_least("min_tokens_per_s_per_gpu", "Training tokens per second and GPU", training.get("tokens_per_s_per_gpu"),
             gates.min_tokens_per_s_per_gpu)  # fmt: skip
    return tuple(found)


def _statement(primary: GroupFigures, is_improvement: bool, alpha: float) -> str:
    before, after, paired = primary.original.exact_match, primary.finetuned.exact_match, primary.paired
    if paired.difference is None or before.value is None or after.value is None:
        return "No improvement can be claimed: no request needing a call was scored for both models."
    figures = (
        f"exact match on {paired.n} requests needing a call went from {before.value:.1%} to {after.value:.1%} "
        f"({100 * paired.difference:+.1f} points, 95 % interval {100 * (paired.low or 0):+.1f} to "
        f"{100 * (paired.high or 0):+.1f}, p = {paired.p_value:.2g}; {paired.num_fixed} fixed, "
        f"{paired.num_broken} broken)"
    )
    if is_improvement:
        return f"The fine-tuned model is better: {figures}."
    return f"No improvement is shown (it would need p < {alpha:g}): {figures}."


def _compared(
    example: Example,
    before: Score,
    after: Score,
    original: Mapping[str, Prediction],
    finetuned: Mapping[str, Prediction],
) -> ComparedExample:
    was, is_ = before.outcome is Outcome.CORRECT, after.outcome is Outcome.CORRECT
    if Outcome.UNSCORED in (before.outcome, after.outcome):
        kind = "unscored"
    else:
        kind = {(False, True): "fixed", (True, False): "broken", (False, False): "still wrong"}.get((was, is_), "kept")
    return ComparedExample(
        example_id=example.id,
        kind=kind,
        category=example.category,
        slice=example.slice,
        request=example.request,
        expected=calls_to_json(example.expected) if example.expected else "(no call)",
        original=original[example.id].text if example.id in original else "",
        original_reason=before.reason,
        finetuned=finetuned[example.id].text if example.id in finetuned else "",
        finetuned_reason=after.reason,
    )
