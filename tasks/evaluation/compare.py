"""Scores of two models to a verdict."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from tasks.contracts.comparison import (
    FAULTS,
    ChampionFigures,
    ComparedExample,
    Comparison,
    GroupFigures,
    ModelFigures,
    Outcome,
    PairedDifference,
    Score,
    Sensitivity,
)
from tasks.contracts.conversation import CATEGORIES, Call, Example, calls_to_json
from tasks.contracts.files import digest_of
from tasks.contracts.measurements import Measurements
from tasks.contracts.prediction import Prediction
from tasks.contracts.settings import GateSettings
from tasks.evaluation.gates import check_gates
from tasks.evaluation.scoring import score
from tasks.evaluation.statistics import holm, is_improvement, paired_difference, requests_needed, share

ALPHA = 0.05
"""An improvement is claimed below this p-value, or below the run's own gate where that is stricter."""

SHOWN_DIFFERENCES = (0.02, 0.05, 0.1, 0.2)
"""Sizes of a difference for which the report says how many requests would show it."""
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
    measured: Measurements,
) -> Comparison:
    """Judge both models' predictions for the same examples.

    Args:
        measured: the rest of what gates look at.

    Raises:
        ValueError: predictions for other examples, or two for one example.
    """
    answers = {"original": _by_id(examples, original), "finetuned": _by_id(examples, finetuned)}
    scores = {
        model: {example.id: score(example, predictions.get(example.id)) for example in examples}
        for model, predictions in answers.items()
    }
    groups = _groups(examples, scores["original"], scores["finetuned"])
    primary = groups[0]
    by_name = {group.name: group for group in groups}
    checked = check_gates(gates, primary, by_name["no_fitting_tool"], measured)
    alpha = min(ALPHA, gates.max_p_value or ALPHA)
    is_better = is_improvement(primary.paired, alpha)
    compared = tuple(
        _compared(e, scores["original"][e.id], scores["finetuned"][e.id], answers["original"], answers["finetuned"])
        for e in examples
    )
    return Comparison(
        passed=all(gate.passed for gate in checked),
        is_improvement=is_better,
        statement=_statement(primary, is_better, alpha),
        gates=checked,
        groups=groups,
        sensitivity=_sensitivity(primary, alpha),
        examples=compared,
    )


def against_champion(
    examples: Sequence[Example],
    champion: Sequence[Prediction],
    finetuned: Sequence[Prediction],
    version: str,
) -> ChampionFigures:
    """The fine-tuned model against the present champion, on the requests that the verdict rests on.

    Args:
        version: the champion's name and number in the registry.

    Raises:
        ValueError: as :func:`compare`.
    """
    _, belongs = _belongs()[0]
    asked = [example for example in examples if belongs(example)]
    theirs, ours = (
        {example.id: score(example, predictions.get(example.id)) for example in asked}
        for predictions in (_by_id(examples, champion), _by_id(examples, finetuned))
    )
    group = _group(PRIMARY, asked, theirs, ours)
    return ChampionFigures(version, group.original.exact_match, group.paired, _against(group, version))


def champion_not_asked(version: str, why: str) -> ChampionFigures:
    """What a report says in place of a comparison that there was to be."""
    return ChampionFigures(version, None, None, f"The champion, {version}, was not asked: {why}.")


def _against(group: GroupFigures, version: str) -> str:
    paired = group.paired
    if paired.difference is None:
        return f"Nothing can be said against the champion, {version}: no request was scored for both."
    is_better = is_improvement(paired, ALPHA)
    verdict = "is better than" if is_better else f"is not shown (p < {ALPHA:g}) to be better than"
    own, theirs = group.finetuned.exact_match.value or 0, group.original.exact_match.value or 0
    return (
        f"The fine-tuned model {verdict} the champion, {version}: {own:.1%} of {paired.n} requests needing a call exactly right, "
        f"the champion {theirs:.1%} {_in_points(paired)}."
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


def _belongs() -> list[tuple[str, Callable[[Example], bool]]]:
    def category(name: str) -> Callable[[Example], bool]:
        return lambda example: example.slice == "test" and example.category == name

    return [
        (PRIMARY, lambda example: example.slice == "test" and bool(example.expected)),
        *((name, category(name)) for name in CATEGORIES),
        ("unseen_tools", lambda example: example.slice == "unseen_tools"),
    ]


def _groups(
    examples: Sequence[Example], original: Mapping[str, Score], finetuned: Mapping[str, Score]
) -> tuple[GroupFigures, ...]:
    primary, *others = (
        _group(name, [e for e in examples if belongs(e)], original, finetuned) for name, belongs in _belongs()
    )
    corrected = holm([group.paired.p_value for group in others])
    return primary, *(replace(group, p_value_holm=p) for group, p in zip(others, corrected, strict=True))


def _group(
    name: str, examples: Sequence[Example], original: Mapping[str, Score], finetuned: Mapping[str, Score]
) -> GroupFigures:
    before, after = [original[e.id] for e in examples], [finetuned[e.id] for e in examples]
    pairs = [
        (b.outcome is Outcome.CORRECT, a.outcome is Outcome.CORRECT, cluster(e))
        for e, b, a in zip(examples, before, after, strict=True)
        if Outcome.UNSCORED not in (b.outcome, a.outcome)
    ]
    return GroupFigures(
        name=name,
        title=TITLES[name],
        n=len(examples),
        original=_figures(before),
        finetuned=_figures(after),
        paired=paired_difference([b for b, _, _ in pairs], [a for _, a, _ in pairs], [c for _, _, c in pairs]),
        p_value_holm=None,
    )


def cluster(example: Example) -> str:
    """What requests share that are not independent: the first request of their conversation, whatever its case and spaces."""
    first = next((m.content for m in example.messages if m.role == "user"), example.id)
    return " ".join(first.casefold().split())


def _figures(scores: Sequence[Score]) -> ModelFigures:
    scored = [s for s in scores if s.outcome is not Outcome.UNSCORED]
    named = [s for s in scored if s.names_correct is not None]
    calling = [s for s in scored if s.fits_schema is not None]
    faults = Counter(s.fault for s in scored if s.fault is not None)
    return ModelFigures(
        exact_match=share(sum(s.outcome is Outcome.CORRECT for s in scored), len(scored)),
        exact_match_lenient=share(sum(s.lenient_outcome is Outcome.CORRECT for s in scored), len(scored)),
        call_name=share(sum(bool(s.names_correct) for s in named), len(named)),
        arguments=share(sum(s.num_arguments_correct for s in scored), sum(s.num_arguments for s in scored)),
        arguments_given=share(sum(s.num_given_correct for s in scored), sum(s.num_arguments_given for s in scored)),
        parse_rate=share(sum(s.was_parsed for s in scored), len(scored)),
        call_rate=share(sum(s.has_call for s in scored), len(scored)),
        fits_schema=share(sum(bool(s.fits_schema) for s in calling), len(calling)),
        faults={fault: faults[fault] for fault in FAULTS if faults[fault]},
        num_unscored=len(scores) - len(scored),
    )


def _statement(primary: GroupFigures, is_improvement: bool, alpha: float) -> str:
    before, after, paired = primary.original.exact_match, primary.finetuned.exact_match, primary.paired
    if paired.difference is None or before.value is None or after.value is None:
        return "No improvement can be claimed: no request needing a call was scored for both models."
    figures = (
        f"exact match on {paired.n} requests needing a call went from {before.value:.1%} to {after.value:.1%} "
        f"{_in_points(paired)}"
    )
    if is_improvement:
        return f"The fine-tuned model is better: {figures}."
    return f"No improvement is shown (it would need p < {alpha:g}): {figures}."


def _in_points(paired: PairedDifference) -> str:
    """A difference that there is, in brackets."""
    return (
        f"({100 * (paired.difference or 0):+.1f} points, 95 % interval {100 * (paired.low or 0):+.1f} to "
        f"{100 * (paired.high or 0):+.1f}, p = {paired.p_value:.2g}; {paired.num_fixed} fixed, "
        f"{paired.num_broken} broken)"
    )


def _sensitivity(primary: GroupFigures, alpha: float) -> Sensitivity:
    """By the share of discordant requests that was seen; by a third where there was none to go by."""
    paired = primary.paired
    seen = (paired.num_fixed + paired.num_broken) / paired.n if paired.n else 0.0
    discordant = seen or 1 / 3
    needed = [(d, requests_needed(d, max(d, discordant), alpha)) for d in SHOWN_DIFFERENCES]
    return Sensitivity(discordant, tuple(needed))


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
        cluster=digest_of(cluster(example))[:16],
        kind=kind,
        category=example.category,
        slice=example.slice,
        request=example.request,
        expected=_lines(example.expected) or "(no call)",
        original=original[example.id].text if example.id in original else "",
        original_reason=before.reason,
        original_calls=_lines(_read(original.get(example.id))),
        finetuned=finetuned[example.id].text if example.id in finetuned else "",
        finetuned_reason=after.reason,
        finetuned_calls=_lines(_read(finetuned.get(example.id))),
    )


def _read(prediction: Prediction | None) -> tuple[Call, ...]:
    return () if prediction is None else prediction.strict.calls or prediction.lenient.calls


def _lines(calls: Sequence[Call]) -> str:
    """One call a line, in the format of all of them."""
    return "\n".join(calls_to_json([call])[1:-1] for call in calls)
