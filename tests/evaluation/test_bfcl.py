"""BFCL by our rules and by its own checker: the same verdict, but for the differences that docs/evaluation.md lists."""

import copy
from collections import Counter

import pytest

from tasks.contracts.conversation import Call
from tasks.contracts.prediction import Prediction, Reading
from tasks.dataset.bfcl import CATEGORIES, BfclRow, read_bfcl
from tasks.evaluation.bfcl import judge, score_bfcl
from tasks.evaluation.bfcl_checker import check

ROWS = read_bfcl()
CALLING = [row for row in ROWS if row.ground_truth is not None]


def answer(row: BfclRow, calls) -> Prediction:
    reading = Reading(tuple(calls))
    return Prediction(row.example.id, "", reading, reading, 1, 1, False, 1.0)


def changed(row: BfclRow, change) -> list[Call]:
    """The reference answer with every argument changed by a function of name and value; a missing one is dropped."""
    calls = []
    for call in row.example.expected:
        arguments = {n: change(n, copy.deepcopy(v)) for n, v in call.arguments.items()}
        calls.append(Call(call.name, {n: v for n, v in arguments.items() if v is not KeyError}))
    return calls


CHANGES = {
    "as the reference": lambda n, v: v,
    "upper case": lambda n, v: v.upper() if isinstance(v, str) else v,
    "other spaces and signs": lambda n, v: f" {v}." if isinstance(v, str) else v,
    "another number": lambda n, v: v + 1 if isinstance(v, int | float) and not isinstance(v, bool) else v,
    "another text": lambda n, v: v + "x" if isinstance(v, str) else v,
    "numbers as text": lambda n, v: str(v) if isinstance(v, int | float) else v,
    "lists reversed": lambda n, v: v[::-1] if isinstance(v, list) else v,
    "lists shortened": lambda n, v: v[:-1] if isinstance(v, list) else v,
    "null": lambda n, v: None,
    "left out": lambda n, v: KeyError,
}


DELIBERATE = {
    "bfcl:live_multiple_862-181-3": "name different parameters",
    "bfcl:live_multiple_964-207-0": "name different parameters",
    # The checker takes data['sales'] for a variable, and compares it to the letter.
    "bfcl:parallel_multiple_21": "folds texts in fewer places",
    "bfcl:parallel_178": "matched optimally",
}
"""The rows on which any of the answers below is judged otherwise than by the checker."""


def test_all_rows_of_the_eleven_categories_are_read():
    counts = Counter(row.category for row in ROWS)
    assert list(counts) == list(CATEGORIES)
    assert [counts[c] for c in CATEGORIES] == [400, 200, 200, 200, 240, 258, 1053, 16, 24, 884, 16]
    assert len({row.example.id for row in ROWS}) == len(ROWS)
    few = Counter(row.category for row in read_bfcl(20))
    assert few == {c: min(20, counts[c]) for c in CATEGORIES}


@pytest.mark.parametrize("name", CHANGES)
def test_our_folded_rules_and_the_checker_agree_on_every_row_that_it_can_score(name):
    differing = []
    num_unscorable = 0
    for row in CALLING:
        judged = judge(row, answer(row, changed(row, CHANGES[name])))
        num_unscorable += judged.checker is None
        if judged.checker is not None and judged.checker is not judged.folded:
            differing.append(row.example.id)
    assert set(differing) <= DELIBERATE.keys()
    assert num_unscorable <= 1


def test_the_reference_answers_are_right_by_all_three():
    judged = [judge(row, answer(row, row.example.expected)) for row in CALLING]
    # Two rows have parameters with an empty list of allowed values: nothing is right.
    wrong = [row.example.id for row, j in zip(CALLING, judged) if not j.exact]
    assert wrong == ["bfcl:live_simple_106-63-0", "bfcl:live_simple_112-68-0"]
    refused = {row.example.id for row, j in zip(CALLING, judged) if not j.checker}
    assert refused <= {*wrong, *DELIBERATE, "bfcl:live_multiple_121-46-0"}


def test_extra_missing_and_swapped_calls_are_judged_alike():
    for row in CALLING:
        calls = list(row.example.expected)
        for given in (calls[::-1], calls + calls[:1], calls[:-1], [Call("no.such", {}), *calls[1:]], []):
            judged = judge(row, answer(row, given))
            is_alike = judged.checker is None or judged.checker is judged.folded
            assert is_alike or row.example.id in DELIBERATE, (row.example.id, given)


def test_every_deliberate_difference_says_which_it_is():
    rows = {row.example.id: row for row in CALLING if row.example.id in DELIBERATE}
    answers = {
        i: answer(r, changed(r, CHANGES["upper case"])[:: -1 if "178" in i else 1]) for i, r in rows.items()
    }  # fmt: skip
    figures = score_bfcl(list(rows.values()), answers, {})
    assert {d.example_id for d in figures.disagreements} == DELIBERATE.keys()
    assert all(DELIBERATE[d.example_id] in d.reason and d.ours for d in figures.disagreements)


def test_our_default_is_stricter_about_texts():
    stricter = 0
    for row in CALLING:
        judged = judge(row, answer(row, changed(row, CHANGES["upper case"])))
        assert judged.folded or not judged.exact
        stricter += bool(judged.folded) and not judged.exact
    assert stricter > 1000


def row_with(functions, truth, category="parallel") -> BfclRow:
    base = next(row for row in ROWS if row.category == category)
    return BfclRow(category, base.example, functions, truth)


F = {"name": "f", "parameters": {"type": "dict", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}


def test_deliberate_difference_calls_are_matched_optimally():
    row = row_with([F], [{"f": {"a": [1, 2]}}, {"f": {"a": [1]}}])
    calls = [Call("f", {"a": 1}), Call("f", {"a": 2})]
    assert check(row, calls) is False
    assert judge(row, answer(row, calls)).folded


def test_deliberate_difference_numbers_are_one_type_and_true_is_not_1():
    row = row_with([F], [{"f": {"a": [1]}}], "simple_python")
    assert (check(row, [Call("f", {"a": 1.0})]), judge(row, answer(row, [Call("f", {"a": 1.0})])).folded) == (
        False,
        True,
    )
    many = {"name": "f", "parameters": {"type": "dict", "required": ["a"], "properties": {"a": {"type": "dict"}}}}
    row = row_with([many], [{"f": {"a": [{"k": [1]}]}}], "simple_python")
    true = [Call("f", {"a": {"k": True}})]
    assert (check(row, true), judge(row, answer(row, true)).folded) == (True, False)


def test_deliberate_difference_an_empty_text_is_no_way_to_leave_an_argument_out():
    text = {"name": "f", "parameters": {"type": "dict", "properties": {"a": {"type": "string"}}, "required": []}}
    row = row_with([text], [{"f": {"a": ["x", ""]}}], "simple_python")
    assert check(row, [Call("f", {"a": ""})]) is True
    assert not judge(row, answer(row, [Call("f", {"a": ""})])).folded
    assert judge(row, answer(row, [Call("f", {})])).exact


def test_deliberate_difference_what_cannot_be_read_is_no_abstention():
    row = next(row for row in ROWS if row.category == "irrelevance")
    garbage = Prediction(row.example.id, "", Reading((), "not JSON"), Reading(()), 1, 1, False, 1.0)
    judged = judge(row, garbage)
    assert (judged.checker, judged.folded) == (True, False)
    assert judge(row, answer(row, ())).exact


def test_counts_add_up_and_every_disagreement_is_named():
    rows = read_bfcl(3)
    answers = {row.example.id: answer(row, row.example.expected) for row in rows}
    broken = {i: p for i, p in answers.items() if not i.startswith("bfcl:simple")}
    irrelevant = next(row for row in rows if row.category == "irrelevance").example.id
    broken[irrelevant] = Prediction(irrelevant, "", Reading((), "not JSON"), Reading(()), 1, 1, False, 1.0)
    figures = score_bfcl(rows, answers, broken)
    whole = figures.categories[-1]
    assert (whole.name, whole.n) == ("all", 33)
    assert whole.finetuned.num_unscored == 3
    assert sum(c.n for c in figures.categories[:-1]) == whole.n
    assert [d.example_id for d in figures.disagreements] == [irrelevant]
    assert "no abstention" in figures.disagreements[0].reason
