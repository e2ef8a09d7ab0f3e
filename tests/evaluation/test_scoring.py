"""Scoring: what counts as right, and why something does not."""

import pytest

from tasks.contracts.comparison import Outcome
from tasks.contracts.conversation import Call, Example, Message
from tasks.contracts.prediction import Prediction, Reading
from tasks.evaluation.scoring import same_value, score


def example(*expected: Call) -> Example:
    return Example("id", (Message("user", "q"),), (), expected, "", "s", "test")


def prediction(*calls: Call, error: str | None = None, lenient: tuple[Call, ...] | None = None) -> Prediction:
    return Prediction(
        "id", "text", Reading(calls, error), Reading(calls if lenient is None else lenient), 1, 1, False, 1
    )


F = Call("f", {"a": 1, "b": ["x", "y"]})


def test_the_order_of_calls_does_not_matter():
    g = Call("g", {})
    assert score(example(F, g), prediction(g, F)).outcome is Outcome.CORRECT


def test_each_call_counts_once():
    assert score(example(F, F), prediction(F)).outcome is Outcome.WRONG
    assert score(example(F), prediction(F, F)).outcome is Outcome.WRONG
    assert score(example(F, F), prediction(F, F)).outcome is Outcome.CORRECT


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (Call("f", {"a": 2, "b": ["x", "y"]}), "a is 2 instead of 1"),
        (Call("f", {"b": ["x", "y"]}), "a is missing"),
        (Call("f", {"a": 1, "b": ["x", "y"], "c": 0}), "c was not asked for"),
        (Call("g", {}), "does not call f"),
    ],
)
def test_a_wrong_answer_says_why(given, reason):
    judged = score(example(F), prediction(given))
    assert judged.outcome is Outcome.WRONG
    assert reason in judged.reason


def test_a_missing_prediction_is_unscored_and_not_wrong():
    assert score(example(F), None).outcome is Outcome.UNSCORED


def test_an_answer_in_words_is_right_only_where_no_call_is_expected():
    assert score(example(), prediction()).outcome is Outcome.CORRECT
    assert score(example(F), prediction()).outcome is Outcome.WRONG
    assert score(example(), prediction(F)).outcome is Outcome.WRONG


def test_a_call_without_the_format_is_no_abstention():
    judged = score(example(), prediction(lenient=(F,)))
    assert judged.outcome is Outcome.WRONG
    assert "not in the format" in judged.reason


def test_lenient_and_strict_are_kept_apart():
    judged = score(example(F), prediction(error="no tags", lenient=(F,)))
    assert (judged.outcome, judged.lenient_outcome) == (Outcome.WRONG, Outcome.CORRECT)
    assert not judged.was_parsed


def test_arguments_are_counted_on_the_best_fitting_call():
    judged = score(
        example(Call("f", {"a": 1, "b": 1}), Call("f", {"a": 2, "b": 2})),
        prediction(Call("f", {"a": 2, "b": 2}), Call("f", {"a": 1, "b": 9})),
    )
    assert (judged.num_arguments_correct, judged.num_arguments) == (3, 4)


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        (5, 5.0, True),
        (True, 1, False),
        (0, False, False),
        ("5", 5, False),
        ([1, 2], [2, 1], False),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        (None, None, True),
        ("Oslo", "oslo", False),
    ],
)
def test_values_are_compared_as_json(left, right, same):
    assert same_value(left, right) is same
