"""Files are whole or absent, and attempts know when they are stale."""

import json

import pytest

from tasks.contracts.attempt import Attempt, StaleAttempt
from tasks.contracts.conversation import Call, Example, Message, example_from_record, example_to_record
from tasks.contracts.files import digest_of_files, link, publish_folder, write_json
from tasks.contracts.prediction import Prediction, Reading, prediction_from_record, prediction_to_record


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_the_first_of_two_publishers_wins(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
    publish_folder(tmp_path / "a", tmp_path / "final")
    publish_folder(tmp_path / "b", tmp_path / "final")
    assert (tmp_path / "final" / "who").read_text() == "a"
    assert not (tmp_path / "b").exists()


def test_a_link_is_replaced(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        link(tmp_path / "latest", tmp_path / name)
    assert (tmp_path / "latest").resolve() == tmp_path / "b"


def test_a_digest_depends_on_names_and_contents(tmp_path):
    (tmp_path / "x").write_text("1")
    (tmp_path / "y").write_text("2")
    before = digest_of_files(tmp_path.iterdir(), tmp_path)
    (tmp_path / "x").write_text("2")
    (tmp_path / "y").write_text("1")
    assert digest_of_files(tmp_path.iterdir(), tmp_path) != before


def test_a_rank_that_outlived_its_attempt_cannot_write_a_result(tmp_path):
    (tmp_path / "001").mkdir()
    (tmp_path / "NEWEST").write_text("002")
    with pytest.raises(StaleAttempt, match="replaced by attempt 002"):
        Attempt(tmp_path / "001").write_result({})
    assert not (tmp_path / "001" / "result.json").exists()


def test_examples_and_predictions_survive_their_files():
    example = Example(
        id="a",
        messages=(Message("user", "ü"), Message("assistant", calls=(Call("f", {"x": [1, {"y": None}]}),))),
        tools=({"name": "f", "description": "", "parameters": {"type": "object"}},),
        expected=(Call("f", {"x": 1.5}), Call("g", {})),
        answer="",
        source="s",
        slice="test",
    )
    assert example_from_record(example_to_record(example)) == example
    prediction = Prediction("a", "t", Reading((Call("f", {}),)), Reading((), "why"), 3, 4, True, 0.5)
    assert prediction_from_record(prediction_to_record(prediction)) == prediction
