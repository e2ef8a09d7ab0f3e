"""Answers of an attempt that ended are kept for the next, and only for one that asks the same."""

from tasks.contracts.attempt import Attempt
from tasks.contracts.conversation import Call
from tasks.contracts.files import write_json
from tasks.contracts.prediction import Prediction, Reading
from tasks.inference.partial import PartialAnswers, answered_before

READING = Reading((Call("f", {"a": "Ü\u2028\n"}),))


def prediction(example_id: str) -> Prediction:
    return Prediction(example_id, "x\ny\u2028", READING, Reading((), "no"), 1, 2, False, 0.5)


def attempt(tmp_path, number: str, **arguments) -> Attempt:
    folder = tmp_path / number
    folder.mkdir()
    write_json(folder / "spec.json", {"arguments": arguments})
    return Attempt(folder)


def test_answers_come_back_as_they_were_and_half_a_line_is_none(tmp_path):
    first = attempt(tmp_path, "001", adapter="a")
    PartialAnswers(first, 0).add([prediction("1"), prediction("2")])
    PartialAnswers(first, 1).add([prediction("3")])
    with (first.folder / "partial-1.jsonl").open("ab") as file:
        file.write(b'{"example_id": "4", "te')
    again = attempt(tmp_path, "002", adapter="a")
    assert answered_before(again) == [prediction("1"), prediction("2"), prediction("3")]


def test_another_models_answers_are_not_taken_and_those_before_a_requeue_are(tmp_path):
    other = attempt(tmp_path, "001", adapter="b")
    PartialAnswers(other, 0).add([prediction("1")])
    own = attempt(tmp_path, "002", adapter="a")
    # Slurm starts a requeued job in the same folder.
    PartialAnswers(own, 0).add([prediction("2")])
    assert [p.example_id for p in answered_before(own)] == ["2"]


def test_an_example_that_two_attempts_answered_counts_once(tmp_path):
    for number in ("001", "002"):
        PartialAnswers(attempt(tmp_path, number, adapter="a"), 0).add([prediction("1")])
    assert [p.example_id for p in answered_before(attempt(tmp_path, "003", adapter="a"))] == ["1"]


def test_half_a_line_of_a_killed_life_does_not_spoil_the_next_ones(tmp_path):
    own = attempt(tmp_path, "001", adapter="a")
    PartialAnswers(own, 0).add([prediction("1")])
    with (own.folder / "partial-0.jsonl").open("ab") as file:
        file.write(b'{"example_id": "2", "te')
    PartialAnswers(own, 0).add([prediction("3")])
    assert [p.example_id for p in answered_before(own)] == ["1", "3"]
