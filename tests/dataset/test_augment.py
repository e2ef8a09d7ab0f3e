"""Augmentation: off unless asked for, calls and tools still agree, test rows never change, nothing held out comes in."""

import random

import pytest

from tasks.contracts.call_check import check_call
from tasks.contracts.conversation import Call, Example, Message, calls_in
from tasks.dataset.augment import mask_names
from tests.dataset.reading import prepared, write_jsonl
from tests.dataset.test_split import various_rows


def tool(name, *parameters):
    properties = {parameter: {"type": "string", "description": f"the {parameter}"} for parameter in parameters}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"name": name, "description": f"does {name}", "parameters": schema}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows that offer two tools each and call one."""
    draw = random.Random(3)
    rows = []
    for row in various_rows(200):
        own = row["tools"][0]["function"]["name"]
        other = tool(draw.choice([f"tool_{n}" for n in range(30) if f"tool_{n}" != own]), "when")
        row["tools"].append({"type": "function", "function": other})
        rows.append(row)
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def plain(rows, tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("plain") / "out", rows, num_unseen_tools_rows=20, unseen_tools_share=0.3)


def augmented(rows, folder, **augmentation):
    return prepared(
        folder / "out", rows, num_unseen_tools_rows=20, unseen_tools_share=0.3, augmentation=augmentation
    )  # fmt: skip


def assert_calls_fit(examples):
    for example in examples:
        for turn in calls_in(example):
            for call in turn:
                check_call(call, example.tools)


def test_names_are_masked_throughout_and_descriptions_stay(rows, plain, tmp_path):
    result = augmented(rows, tmp_path, mask_names=1.0)
    assert len(result.train) == len(plain.train)
    assert_calls_fit(result.train)
    for example in result.train:
        assert all(t["name"].startswith("function_") for t in example.tools)
        assert all(p.startswith("parameter_") for t in example.tools for p in t["parameters"]["properties"])
        assert all(t["description"] for t in example.tools)
    assert result.test == plain.test
    (tmp_path / "half").mkdir()
    half = augmented(rows, tmp_path / "half", mask_names=0.5)
    masked = sum(example.tools[0]["name"].startswith("function_") for example in half.train)
    assert 0.35 * len(plain.train) < masked < 0.65 * len(plain.train)


def test_masking_follows_calls_through_a_whole_conversation():
    example = Example(
        "id",
        (
            Message("user", "x"),
            Message("assistant", calls=(Call("f", {"a": 1}), Call("g", {"b": 2}))),
            Message("tool", "{}"),
        ),
        (tool("f", "a"), tool("g", "b", "c")),
        (Call("g", {"c": 3, "b": 4}),),
        "",
        "",
        "train",
    )
    masked = mask_names(example, random.Random(1))
    f, g = (t["name"] for t in masked.tools)
    b, c = masked.tools[1]["parameters"]["properties"]
    assert masked.expected == (Call(g, {c: 3, b: 4}),)
    assert [call.name for call in masked.messages[1].calls] == [f, g]
    assert masked.tools[1]["parameters"]["required"] == [b, c]
    assert masked.messages[2] == example.messages[2]


def test_distractors_are_tools_of_training_rows_only(rows, plain, tmp_path):
    result = augmented(rows, tmp_path, num_distractor_tools=3, shuffle_tools=True)
    unseen = {t["name"] for e in plain.test if e.slice == "unseen_tools" for t in e.tools}
    assert unseen
    before = {e.id: [t["name"] for t in e.tools] for e in plain.train}
    for example in result.train:
        names = [t["name"] for t in example.tools]
        assert len(names) == len(set(names)) == 5
        assert set(before[example.id]) < set(names)
        assert not unseen & set(names)
    positions = {[t["name"] for t in e.tools].index(e.expected[0].name) for e in result.train}
    assert positions == {0, 1, 2, 3, 4}
    assert_calls_fit(result.train)
    assert result.test == plain.test


def test_irrelevance_rows_are_added_without_the_fitting_tool(rows, plain, tmp_path):
    result = augmented(rows, tmp_path, irrelevance=0.5, irrelevance_answer="No.")
    added = [e for e in result.train if e.id.endswith(".irrelevant")]
    originals = {e.id: e for e in result.train if not e.id.endswith(".irrelevant")}
    assert originals.keys() == {e.id for e in plain.train}
    assert 0.35 * len(originals) < len(added) < 0.65 * len(originals)
    for example in added:
        original = originals[example.id.removesuffix(".irrelevant")]
        assert (example.expected, example.answer) == ((), "No.")
        assert [t["name"] for t in example.tools] == [original.tools[1]["name"]]
    assert result.manifest["num_train_rows"] == len(result.train) == result.tokens.num_rows
    assert result.quality["categories"]["train"]["no_fitting_tool"] == len(added)


def test_the_same_seed_changes_the_same_rows_whatever_the_number_of_workers(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", various_rows(2000))
    wanted = {"mask_names": 0.5, "shuffle_tools": True, "num_distractor_tools": 2, "irrelevance": 0.2}
    one, two = (
        prepared(tmp_path / str(n), rows, augmentation=wanted, num_workers=n) for n in (1, 2)
    )  # fmt: skip
    assert one.tokens.equals(two.tokens)
    assert one.train == two.train


def test_augmentation_changes_no_category(rows, plain, tmp_path):
    shuffled = augmented(rows, tmp_path, shuffle_tools=True)
    assert shuffled.quality["categories"] == plain.quality["categories"]


@pytest.mark.parametrize(
    ("parameters", "system"),
    [
        ({"properties": {"a": {}}, "anyOf": [{"required": ["a"]}]}, "Be brief."),
        ({"properties": {"a": {}}, "$defs": {"x": {}}}, "Be brief."),
        ({"properties": {"a": {}}}, "Call f when asked."),
    ],
)
def test_what_cannot_be_masked_throughout_is_left_as_it_is(parameters, system):
    offered = {"name": "f", "description": "d", "parameters": {"type": "object"} | parameters}
    messages = (Message("system", system), Message("user", "x"))
    example = Example("id", messages, (offered,), (Call("f", {"a": 1}),), "", "", "train")
    assert mask_names(example, random.Random(1)) == example


def test_a_title_does_not_give_the_masked_name_away():
    schema = {"title": "PlaceArguments", "properties": {"place": {"title": "Place", "type": "string"}}}
    offered = {"name": "f", "description": "d", "parameters": schema}
    example = Example("id", (Message("user", "x"),), (offered,), (), "no", "", "train")
    assert "lace" not in str(mask_names(example, random.Random(1)).tools)
