"""The verdict: gates, improvement beyond chance, and counts that add up."""

from dataclasses import replace

import numpy as np
import pytest

from tasks.contracts.conversation import Call, Example, Message
from tasks.contracts.prediction import Prediction, Reading
from tasks.contracts.settings import GateSettings
from tasks.evaluation.compare import compare

GATES = GateSettings(min_requests=100)
RIGHT, WRONG = Call("f", {"a": 1}), Call("f", {"a": 2})
TOOLS = ({"name": "f", "description": "", "parameters": {"type": "object"}},)
TRAINING = {"final_loss": 0.1, "tokens_per_s_per_gpu": 100.0}


def examples(num_calls: int = 120, num_without: int = 20) -> list[Example]:
    return [
        Example(f"{i:04d}", (Message("user", f"q{i}"),), TOOLS, (RIGHT,) if i < num_calls else (), "no", "s", "test")
        for i in range(num_calls + num_without)
    ]


def answers(tests: list[Example], right: list[bool]) -> list[Prediction]:
    def reading(example: Example, ok: bool) -> Reading:
        if example.expected:
            return Reading((RIGHT if ok else WRONG,))
        return Reading(() if ok else (WRONG,))

    return [
        Prediction(e.id, "t", reading(e, ok), reading(e, ok), 1, 1, False, 1)
        for e, ok in zip(tests, right, strict=True)
    ]


def test_a_clear_improvement_passes():
    tests = examples()
    result = compare(tests, answers(tests, [False] * 140), answers(tests, [True] * 140), GATES, TRAINING)
    assert result.passed
    assert result.is_improvement
    assert "went from 0.0% to 100.0%" in result.statement
    assert "120 requests" in result.statement


def test_a_model_that_never_calls_fails_although_it_abstains_always():
    tests = examples()
    silent = [Prediction(e.id, "no", Reading(()), Reading(()), 1, 1, False, 1) for e in tests]
    result = compare(tests, answers(tests, [False] * 140), silent, GATES, TRAINING)
    gates = {gate.name: gate for gate in result.gates}
    assert gates["min_abstention"].passed
    assert not gates["min_call_rate"].passed
    assert not result.passed


def test_a_significant_loss_passes_no_p_value_gate():
    tests = examples()
    result = compare(tests, answers(tests, [True] * 140), answers(tests, [False] * 140), GATES, TRAINING)
    assert not {gate.name: gate for gate in result.gates}["max_p_value"].passed
    assert not result.is_improvement
    assert result.statement.startswith("No improvement")


def test_a_missing_figure_fails_its_gate():
    tests = examples(num_without=0)
    gates = GateSettings(min_requests=None, max_final_loss=1.0)
    result = compare(tests, answers(tests, [False] * 120), answers(tests, [True] * 120), gates, {})
    failed = {gate.name: gate.value for gate in result.gates if not gate.passed}
    assert failed == {"min_abstention": None, "max_final_loss": None}


def test_a_lost_prediction_is_counted_as_unscored_in_its_group():
    tests = examples()
    result = compare(tests, answers(tests, [True] * 140)[1:], answers(tests, [True] * 140), GATES, TRAINING)
    primary = result.groups[0]
    assert (primary.n, primary.original.num_unscored, primary.paired.n) == (120, 1, 119)
    assert sum(example.kind == "unscored" for example in result.examples) == 1
    assert len(result.examples) == 140


@pytest.mark.parametrize(("change", "message"), [("id", "another test set"), ("twice", "two predictions")])
def test_predictions_of_another_test_set_are_refused(change, message):
    tests = examples()
    given = answers(tests, [True] * 140)
    given = [*given, given[0]] if change == "twice" else [*given[1:], replace(given[0], example_id="other")]
    with pytest.raises(ValueError, match=message):
        compare(tests, given, answers(tests, [True] * 140), GATES, TRAINING)


def test_chance_is_called_improvement_at_most_one_time_in_twenty():
    tests = examples(num_calls=100, num_without=0)
    gates = GateSettings(max_p_value=None)
    rng = np.random.default_rng(3)
    claimed = 0
    for _ in range(200):
        before, after = rng.random((2, 100)) < 0.5
        result = compare(tests, answers(tests, list(before)), answers(tests, list(after)), gates, TRAINING)
        claimed += result.is_improvement
    assert claimed <= 10
