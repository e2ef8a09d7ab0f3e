"""Scoring: what counts as right, and why something does not."""

import pytest

from tasks.contracts.comparison import Outcome
from tasks.contracts.conversation import Call, Example, Message
from tasks.contracts.prediction import Prediction, Reading
from tasks.evaluation.matching import ExpectedCall
from tasks.evaluation.scoring import score
from tasks.evaluation.values import FOLDED, Fields, OneOf, same_value


def example(*expected: Call, tools=()) -> Example:
    return Example("id", (Message("user", "q"),), tools, expected, "", "s", "test")


def tool(name: str, required=(), **properties) -> dict:
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"name": name, "description": "", "parameters": parameters}


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


def test_text_in_another_unicode_form_is_the_same_text():
    assert same_value("Z\u00fcrich", "Zu\u0308rich")
    assert not same_value("Zürich", "Zurich")


def test_folded_text_forgives_what_bfcl_forgives_and_no_more():
    assert same_value("April 1, 2024", "april 1 2024", FOLDED)
    assert not same_value("April 1, 2024", "April 2, 2024", FOLDED)
    assert not same_value(5, "5", FOLDED)


def test_any_of_the_allowed_values_is_right_and_no_other():
    accepted = [ExpectedCall("f", {"unit": OneOf(("celsius", "C")), "n": OneOf((1,), may_be_missing=True)})]
    for arguments in ({"unit": "C"}, {"unit": "celsius", "n": 1}):
        assert score(example(F), prediction(Call("f", arguments)), accepted).outcome is Outcome.CORRECT
    judged = score(example(F), prediction(Call("f", {"unit": "K", "n": 1})), accepted)
    assert judged.reason == 'f: unit is "K" instead of "celsius" or "C"'
    assert (judged.num_arguments_correct, judged.num_arguments) == (1, 2)
    assert score(example(F), prediction(Call("f", {"n": 1})), accepted).fault == "missing_argument"


def test_each_field_of_an_object_has_allowed_values_of_its_own():
    where = Fields({"city": OneOf(("Oslo", "OSL")), "zip": OneOf(("0150",), may_be_missing=True)})
    accepted = [ExpectedCall("f", {"where": OneOf((where,))})]
    for given, is_right in (
        ({"city": "OSL"}, True),
        ({"city": "Oslo", "zip": "0150"}, True),
        ({"zip": "0150"}, False),
        ({"city": "Oslo", "street": "x"}, False),
    ):
        judged = score(example(F), prediction(Call("f", {"where": given})), accepted)
        assert (judged.outcome is Outcome.CORRECT) is is_right


def test_an_optional_argument_at_its_default_may_be_given_or_left_out():
    tools = (tool("f", ["a"], a={"type": "integer"}, unit={"type": "string", "default": "celsius"}),)
    bare, full = Call("f", {"a": 1}), Call("f", {"a": 1, "unit": "celsius"})
    for expected in (bare, full):
        for given in (bare, full):
            assert score(example(expected, tools=tools), prediction(given)).outcome is Outcome.CORRECT
    other = Call("f", {"a": 1, "unit": "kelvin"})
    assert score(example(bare, tools=tools), prediction(other)).fault == "unexpected_argument"
    assert score(example(other, tools=tools), prediction(bare)).fault == "missing_argument"


def test_parallel_calls_are_matched_so_that_most_is_right_and_not_first_come_first_served():
    # First come, first served gives the loose call the only answer that the tight one accepts.
    loose, tight = ExpectedCall("f", {"a": OneOf((1, 2))}), ExpectedCall("f", {"a": OneOf((1,))})
    given = (Call("f", {"a": 1}), Call("f", {"a": 2}))
    assert score(example(F, F), prediction(*given), [loose, tight]).outcome is Outcome.CORRECT
    assert score(example(F, F), prediction(*given[::-1]), [loose, tight]).outcome is Outcome.CORRECT


def test_one_right_call_counts_more_than_many_right_arguments():
    expected = (Call("f", {"a": 1, "b": 1, "c": 1}), Call("f", {"a": 2}))
    judged = score(example(*expected), prediction(Call("f", {"a": 2}), Call("f", {"a": 1, "b": 1, "c": 9})))
    assert judged.reason == "f: c is 9 instead of 1"


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ((Call("g", {"a": 1}),), "wrong_function"),
        ((Call("h", {}),), "not_offered"),
        ((Call("f", {"a": "1"}),), "wrong_type"),
        ((Call("f", {"a": True}),), "wrong_type"),
        ((Call("f", {"a": 2}),), "wrong_value"),
        ((Call("f", {}),), "missing_argument"),
        ((Call("f", {"a": 1, "z": 1}),), "unexpected_argument"),
        ((Call("f", {"a": 1}), Call("g", {})), "extra_call"),
        ((), "no_call"),
    ],
)
def test_each_fault_has_a_name_of_its_own(given, fault):
    tools = (tool("f", ["a"], a={"type": "integer"}), tool("g"))
    judged = score(example(Call("f", {"a": 1}), tools=tools), prediction(*given))
    assert (judged.outcome, judged.fault) == (Outcome.WRONG, fault)


def test_a_call_that_its_schema_refuses_is_counted_apart_from_a_wrong_value():
    tools = (tool("f", ["a"], a={"type": "integer"}),)
    right = example(Call("f", {"a": 1}), tools=tools)
    assert score(right, prediction(Call("f", {"a": 2}))).fits_schema is True
    assert score(right, prediction(Call("f", {"a": "2"}))).fits_schema is False
    assert score(right, prediction(Call("h", {}))).fits_schema is False
    assert score(right, prediction()).fits_schema is None


def test_an_answer_that_repeats_itself_is_wrong_in_few_words():
    right = example(F, tools=(tool("f", [], a={}, b={}),))
    judged = score(right, prediction(*[F] * 5000))
    assert judged.outcome is Outcome.WRONG
    assert len(judged.reason) < 300


def test_arguments_given_count_those_that_were_given_and_a_default_is_right_written_or_not():
    tools = (tool("f", ["a"], a={"type": "integer"}, unit={"type": "string", "default": "c"}),)
    left_out = score(example(Call("f", {"a": 1, "unit": "c"}), tools=tools), prediction(Call("f", {"a": 1})))
    assert (left_out.num_given_correct, left_out.num_arguments_given) == (1, 1)
    written_out = score(example(Call("f", {"a": 1}), tools=tools), prediction(Call("f", {"a": 1, "unit": "c"})))
    assert (written_out.outcome, written_out.num_given_correct, written_out.num_arguments_given) == (
        Outcome.CORRECT,
        2,
        2,
    )
    wrong = score(example(Call("f", {"a": 1}), tools=tools), prediction(Call("f", {"a": 2, "z": 1})))
    assert (wrong.num_given_correct, wrong.num_arguments_given) == (0, 2)
