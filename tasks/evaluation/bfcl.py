"""BFCL's rows by our rules and, beside them, by its own checker."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.contracts.comparison import Outcome
from tasks.contracts.prediction import Prediction
from tasks.contracts.suite import Disagreement, SuiteCategory, SuiteFigures, SuiteModel
from tasks.dataset.bfcl import BfclRow
from tasks.evaluation.bfcl_checker import check
from tasks.evaluation.matching import ExpectedCall
from tasks.evaluation.scoring import score
from tasks.evaluation.statistics import paired_difference, share
from tasks.evaluation.values import EXACT, FOLDED, Fields, Items, OneOf, Rules


def accepted_calls(row: BfclRow) -> list[ExpectedCall]:
    """A row's allowed values as expected calls; a required parameter is never left out, whatever the values say."""
    required = {f["name"]: set(f["parameters"].get("required", ())) for f in row.functions}
    return [
        ExpectedCall(
            name, {p: _one_of(values, may_be_missing=p not in required.get(name, ())) for p, values in allowed.items()}
        )
        for entry in row.ground_truth or ()
        for name, allowed in entry.items()
    ]


def _one_of(values: Any, *, may_be_missing: bool = True) -> OneOf:
    entries = values if isinstance(values, list) else [values]
    # Of a required parameter "" is a value like any other.
    return OneOf(tuple(_value(v) for v in entries if v != "" or not may_be_missing), may_be_missing and "" in entries)


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        return Fields({key: _one_of(allowed) for key, allowed in value.items()})
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return Items(tuple(_value(item) for item in value))
    return value


@dataclass(frozen=True)
class _Judged:
    """One answer by all rules; None: not judged."""

    exact: bool | None
    folded: bool | None
    checker: bool | None
    has_call: bool


def score_bfcl(
    rows: Sequence[BfclRow], original: Mapping[str, Prediction], finetuned: Mapping[str, Prediction]
) -> SuiteFigures:
    """Both models on all rows.

    Args:
        original, finetuned: predictions by the examples' ids.
    """
    judged = [(r, judge(r, original.get(r.example.id)), judge(r, finetuned.get(r.example.id))) for r in rows]
    names = [*dict.fromkeys(row.category for row in rows), "all"]
    categories = tuple(_category(name, [j for j in judged if name in ("all", j[0].category)]) for name in names)
    disagreements = tuple(
        Disagreement(row.example.id, model, j.folded, j.checker, _why(row, j))
        for row, before, after in judged
        for model, j in (("original", before), ("finetuned", after))
        if j.folded is not None and j.checker is not None and j.folded is not j.checker
    )
    return SuiteFigures("bfcl", categories, disagreements)


def judge(row: BfclRow, prediction: Prediction | None) -> _Judged:
    """One answer by our rules, exact and folded, and by the benchmark's checker."""
    if prediction is None:
        return _Judged(None, None, None, False)
    calls = prediction.strict.calls
    if row.wants_a_call:
        return _Judged(bool(calls), bool(calls), bool(calls), bool(calls or prediction.lenient.calls))
    exact, folded = (_is_right(row, prediction, rules) for rules in (EXACT, FOLDED))
    # The checker counts whatever it cannot read as an answer without a call.
    theirs = check(row, calls) if row.ground_truth is not None else not calls
    return _Judged(exact, folded, theirs, bool(calls or prediction.lenient.calls))


def _is_right(row: BfclRow, prediction: Prediction, rules: Rules) -> bool:
    return score(row.example, prediction, accepted_calls(row), rules).outcome is Outcome.CORRECT


def _why(row: BfclRow, judged: _Judged) -> str:
    if row.ground_truth is None:
        return "an answer that cannot be read, or calls outside the format told, is no abstention for us"
    if _contradicts_itself(row):
        return "the row's schema and its answer name different parameters: the checker takes nothing for right"
    if judged.folded and len(row.ground_truth) > 1:
        return "calls are matched optimally by us, first come first served by the checker, which also folds texts in fewer places"
    if judged.folded:
        return "values are compared as JSON by us: 5 and 5.0 are one number, texts are folded wherever they stand"
    return 'values are compared as JSON by us: true is not 1, and "" is no way to leave an argument out'


def _contradicts_itself(row: BfclRow) -> bool:
    schemas = {f["name"]: f["parameters"] for f in row.functions}
    return any(
        allowed.keys() - schemas[name]["properties"].keys() or set(schemas[name].get("required", ())) - allowed.keys()
        for entry in row.ground_truth or ()
        for name, allowed in entry.items()
        if name in schemas
    )


def _category(name: str, judged: Sequence[tuple[BfclRow, _Judged, _Judged]]) -> SuiteCategory:
    pairs = [(a.folded, b.folded) for _, a, b in judged if a.folded is not None and b.folded is not None]
    return SuiteCategory(
        name=name,
        n=len(judged),
        original=_model([a for _, a, _ in judged]),
        finetuned=_model([b for _, _, b in judged]),
        paired=paired_difference([bool(a) for a, _ in pairs], [bool(b) for _, b in pairs]),
    )


def _model(judged: Sequence[_Judged]) -> SuiteModel:
    scored = [j for j in judged if j.exact is not None]
    checked = [j for j in scored if j.checker is not None]
    return SuiteModel(
        exact=share(sum(bool(j.exact) for j in scored), len(scored)),
        folded=share(sum(bool(j.folded) for j in scored), len(scored)),
        checker=share(sum(bool(j.checker) for j in checked), len(checked)),
        agreement=share(sum(j.checker is j.folded for j in checked), len(checked)),
        call_rate=share(sum(j.has_call for j in scored), len(scored)),
        num_unscored=len(judged) - len(scored),
    )
