"""One's own question: refused in time with the next step, shown in columns."""

import json

import pytest

from tasks.contracts.conversation import Call, Example, Message
from tasks.contracts.files import write_json
from tasks.contracts.prediction import Prediction, Reading
from tasks.inference.ask import NotAsked, find_run, main, read_tools, side_by_side

WEATHER = {
    "name": "get_weather",
    "description": "Weather",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}


def test_an_unknown_run_lists_those_there_are(tmp_path, capsys):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    write_json(tmp_path / "runs" / "mine" / "experiment.json", {})
    assert main(["yours", "q", "--storage", str(tmp_path)]) == 2
    assert "no run 'yours'" in (error := capsys.readouterr().err)
    assert "there are: mine" in error
    with pytest.raises(NotAsked, match="no finished adapter"):
        find_run("mine", str(tmp_path))


@pytest.mark.parametrize("written", [[WEATHER], [{"type": "function", "function": WEATHER}], WEATHER])
def test_tools_are_read_in_both_spellings(tmp_path, written):
    (tmp_path / "tools.json").write_text(json.dumps(written))
    assert read_tools(tmp_path / "tools.json") == (WEATHER,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting"),
        ("[1]", "a tool is an object"),
        ('[{"name": "f", "parameters": {"$ref": "http://x"}}]', "parameters of f"),
    ],
)
def test_tools_that_cannot_be_used_are_refused_by_name(tmp_path, text, message):
    (tmp_path / "tools.json").write_text(text)
    with pytest.raises(NotAsked, match=message):
        read_tools(tmp_path / "tools.json")


def test_both_answers_stand_side_by_side_and_below_each_other_where_it_is_narrow():
    example = Example("q", (Message("user", "q"),), (WEATHER,), (), "", "s", "test")
    words = Prediction("q", "It is warm " * 9, Reading(()), Reading(()), 1, 30, True, 1.5)
    calls = Reading((Call("get_weather", {"place": 5}), Call("get_weather", {"place": "Paris"})))
    called = Prediction("q", "<tool_call>...", calls, calls, 1, 20, False, 0.5)
    answers = [("original model", words), ("fine-tuned model", called)]
    wide = side_by_side(example, answers, 100)
    assert wide.splitlines()[0].split("|")[1].strip() == "FINE-TUNED MODEL"
    assert all(len(line) <= 100 for line in wide.splitlines())
    assert "fits its schema" in wide
    assert "does not fit: schema_mismatch" in " ".join(wide.split())
    narrow = side_by_side(example, answers, 60)
    assert narrow.index("ORIGINAL MODEL") < narrow.index("FINE-TUNED MODEL")
    assert all(len(line) <= 60 for line in narrow.splitlines())
