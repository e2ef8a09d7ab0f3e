"""The verdict: gates, improvement beyond chance, and counts that add up."""

from dataclasses import replace

import pytest

from tasks.contracts.conversation import Call, Example, Message
from tasks.contracts.measurements import Measurements, ModelSpeed, StageTime
from tasks.contracts.prediction import Prediction, Reading
from tasks.contracts.settings import GateSettings
from tasks.evaluation.compare import against_champion, compare

GATES = GateSettings(min_requests=100)
RIGHT, WRONG = Call("f", {"a": 1}), Call("f", {"a": 2})
TOOLS = ({"name": "f", "description": "", "parameters": {"type": "object"}},)
MEASURED = Measurements(has_final_checkpoint=True, num_out_of_memory=0, final_loss=0.1)


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
    result = compare(tests, answers(tests, [False] * 140), answers(tests, [True] * 140), GATES, MEASURED)
    assert result.passed
    assert result.is_improvement
    assert "went from 0.0% to 100.0%" in result.statement
    assert "120 requests" in result.statement


@pytest.mark.parametrize(
    ("champion_right", "verdict", "difference", "fixed", "broken"),
    [
        (60, "is better than the champion, m version 1", 40 / 120, 40, 0),
        (99, "is not shown (p < 0.05) to be better than the champion, m version 1", 1 / 120, 1, 0),
        (110, "is not shown (p < 0.05) to be better than the champion, m version 1", -10 / 120, 0, 10),
    ],
)
def test_against_the_champion_the_requests_of_the_verdict_count(champion_right, verdict, difference, fixed, broken):
    tests = examples()
    # What needs no call decides nothing, whoever is right there.
    champion = answers(tests, [i < champion_right for i in range(120)] + [True] * 20)
    ours = answers(tests, [i < 100 for i in range(120)] + [False] * 20)
    against = against_champion(tests, champion, ours, "m version 1")
    assert verdict in against.statement
    assert against.exact_match.value == pytest.approx(champion_right / 120)
    assert (against.paired.n, against.paired.num_fixed, against.paired.num_broken) == (120, fixed, broken)
    assert against.paired.difference == pytest.approx(difference)


def test_against_a_champion_of_whom_no_answer_came_nothing_is_said():
    tests = examples()
    against = against_champion(tests, [], answers(tests, [True] * 140), "m version 1")
    assert against.paired.difference is None
    assert "no request was scored for both" in against.statement


def test_a_model_that_never_calls_fails_although_it_abstains_always():
    tests = examples()
    silent = [Prediction(e.id, "no", Reading(()), Reading(()), 1, 1, False, 1) for e in tests]
    result = compare(tests, answers(tests, [False] * 140), silent, GATES, MEASURED)
    gates = {gate.name: gate for gate in result.gates}
    assert gates["min_abstention"].passed
    assert not gates["min_call_rate"].passed
    assert not result.passed


def test_a_significant_loss_passes_no_p_value_gate():
    tests = examples()
    result = compare(tests, answers(tests, [True] * 140), answers(tests, [False] * 140), GATES, MEASURED)
    assert not {gate.name: gate for gate in result.gates}["max_p_value"].passed
    assert not result.is_improvement
    assert result.statement.startswith("No improvement")


def test_a_missing_figure_fails_its_gate():
    tests = examples(num_without=0)
    gates = GateSettings(min_requests=None, max_final_loss=1.0)
    result = compare(tests, answers(tests, [False] * 120), answers(tests, [True] * 120), gates, Measurements())
    failed = {gate.name: gate.value for gate in result.gates if not gate.passed}
    assert failed == {"min_abstention": None, "max_final_loss": None, "max_out_of_memory": None, "final_checkpoint": 0}


@pytest.mark.parametrize(
    ("setting", "threshold", "better", "worse"),
    [
        ("min_gpu_utilization", 0.8, {"gpu_utilization": 0.8}, {"gpu_utilization": 0.79}),
        ("min_gpu_memory_share", 0.7, {"gpu_memory_share": 0.7}, {"gpu_memory_share": 0.69}),
        ("min_tokens_per_s_per_gpu", 2000, {"tokens_per_s_per_gpu": 2000}, {"tokens_per_s_per_gpu": 1999}),
        ("max_final_loss", 1.5, {"final_loss": 1.4}, {"final_loss": 1.5}),
        ("max_hours", 4, {"wall_hours": 3.9}, {"wall_hours": 4}),
        ("max_gpu_hours", 64, {"gpu_hours": 64}, {"gpu_hours": 64.1}),
        ("max_out_of_memory", 0, {"num_out_of_memory": 0}, {"num_out_of_memory": 1}),
        ("min_inference_tokens_per_s", 100, {"finetuned": ModelSpeed(100)}, {"finetuned": ModelSpeed(99)}),
        (
            "max_plain_loss_increase",
            0.1,
            {"original": ModelSpeed(plain_loss=2), "finetuned": ModelSpeed(plain_loss=2.1)},
            {"original": ModelSpeed(plain_loss=2), "finetuned": ModelSpeed(plain_loss=2.21)},
        ),
    ],
)
def test_each_criterion_of_a_reference_run_passes_at_its_threshold_and_fails_beyond_it(
    setting, threshold, better, worse
):
    tests = examples()
    gates = GateSettings(**{setting: threshold})
    for measured, expected in ((better, True), (worse, False), ({}, False)):
        measurements = replace(MEASURED, num_out_of_memory=None, final_loss=None)
        measurements = replace(measurements, **measured)
        result = compare(tests, answers(tests, [False] * 140), answers(tests, [True] * 140), gates, measurements)
        assert {gate.name: gate.passed for gate in result.gates}[setting] is expected


def test_a_stage_without_a_result_and_an_adapter_that_is_not_whole_fail_the_run():
    tests = examples()
    stages = tuple(StageTime(name, 1, 1, False, 1, name != "b") for name in "ab")
    measured = replace(MEASURED, stages=stages, has_final_checkpoint=False)
    result = compare(tests, answers(tests, [False] * 140), answers(tests, [True] * 140), GATES, measured)
    failed = {gate.name: (gate.value, gate.threshold) for gate in result.gates if not gate.passed}
    assert failed == {"stages_succeeded": (1, 2), "final_checkpoint": (0, 1)}


def test_categories_are_corrected_for_being_several_and_the_verdict_is_not():
    tests = examples(num_calls=8, num_without=8)
    # Six fixed in each of two groups that are tested: 2/2^6 alone, twice that together.
    after = [True] * 6 + [False] * 2 + [True] * 6 + [False] * 2
    result = compare(tests, answers(tests, [False] * 16), answers(tests, after), GATES, MEASURED)
    assert result.groups[0].p_value_holm is None
    corrected = {g.name: (g.paired.p_value, g.p_value_holm) for g in result.groups[1:] if g.n}
    assert corrected.keys() == {"one_call", "no_fitting_tool"}
    assert list(corrected.values()) == [pytest.approx((2 / 2**6, 4 / 2**6))] * 2


def test_requests_of_one_conversation_are_one_piece_of_evidence():
    tests = [replace(e, messages=(Message("user", f"  Q{i % 5} "),)) for i, e in enumerate(examples(20, 0))]
    result = compare(tests, answers(tests, [False] * 20), answers(tests, [True] * 20), GATES, MEASURED)
    assert (result.groups[0].paired.n, result.groups[0].paired.num_clusters) == (20, 5)
    assert not result.is_improvement


def test_a_lost_prediction_is_counted_as_unscored_in_its_group():
    tests = examples()
    result = compare(tests, answers(tests, [True] * 140)[1:], answers(tests, [True] * 140), GATES, MEASURED)
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
        compare(tests, given, answers(tests, [True] * 140), GATES, MEASURED)


def test_a_model_compared_with_itself_is_no_improvement():
    tests = examples()
    same = answers(tests, [True, False] * 70)
    result = compare(tests, same, same, GATES, MEASURED)
    assert not result.is_improvement
    assert not result.passed
    assert {example.kind for example in result.examples} == {"kept", "still wrong"}
