"""Augmentation: off unless asked for, calls and tools still agree, test rows never change, nothing held out comes in."""

import random

import pytest

from tasks.contracts.call_check import check_call
from tasks.contracts.conversation import Call, Example, Message, calls_in, example_to_record
from tasks.contracts.settings import DatasetSettings
from tasks.dataset.augment import OUTCOMES, Augmenter, mask_names
from tasks.dataset.rendering.family import FAMILIES
from tests.dataset.reading import BYTES, prepared, write_jsonl
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


def test_the_report_says_what_became_of_every_row_and_why_not(rows, plain, tmp_path):
    wanted = {"mask_names": 1.0, "shuffle_tools": True, "num_distractor_tools": 3, "irrelevance": 1.0}
    result = augmented(rows, tmp_path, **wanted)
    counts = result.quality["augmentation"]
    written = len(result.train)
    twins = sum(example.id.endswith(".irrelevant") for example in result.train)
    assert counts == {
        "masked": written, "shuffled": written, "distractors_added": written, "irrelevance_added": twins
    }  # fmt: skip
    assert twins == len(plain.train)
    report = (result.folder / "quality.md").read_text()
    assert f"| `irrelevance_added` | {twins} |" in report
    assert plain.quality["augmentation"] == {}
    assert "augmentation" not in (plain.folder / "quality.md").read_text()


def asked(*tools, system="Stay dry.", called=None):
    messages = (Message("system", system), Message("user", "x"))
    calls = (Call(called, {}),) if called else ()
    return Example("id", messages, tools, calls, "" if called else "No.", "", "train")


def test_every_reason_why_a_row_could_not_be_changed_is_counted(tmp_path):
    f, g, h = tool("f"), tool("g"), tool("h")
    odd = {**f, "parameters": f["parameters"] | {"minProperties": 0}}
    wanted = {"mask_names": 1.0, "shuffle_tools": True, "irrelevance": 1.0}
    BYTES.save(str(tmp_path / "tokenizer.json"))

    def outcomes(example, *pool, num_distractor_tools=0, max_length_tokens=5000):
        augmentation = wanted | {"num_distractor_tools": num_distractor_tools}
        settings = DatasetSettings(
            sources=["rows.jsonl"], augmentation=augmentation, max_length_tokens=max_length_tokens
        )
        augmenter = Augmenter(settings, FAMILIES["smollm2"], tmp_path / "tokenizer.json", pool)
        result = augmenter([example_to_record(example)])
        assert len(result.records) == len(result.tokens)
        return dict(result.counts)

    found = [
        (asked(f, g, called="f"), {"masked": 2, "shuffled": 1, "not_shuffled": 1, "irrelevance_added": 1}),
        (asked(), {"not_masked_no_tools": 1, "not_shuffled": 1, "irrelevance_no_call": 1}),
        (asked(f, called="f"), {"masked": 1, "not_shuffled": 1, "irrelevance_no_other_tool": 1}),
        (asked(f, g, system="Call f."), {"not_masked_told_by_name": 1, "shuffled": 1, "irrelevance_no_call": 1}),
        (asked(odd, g), {"not_masked_schema": 1, "shuffled": 1, "irrelevance_no_call": 1}),
    ]
    for example, expected in found:
        assert outcomes(example) == expected
    with_two = {"masked": 2, "shuffled": 2, "irrelevance_added": 1, "distractors_added": 2}
    assert outcomes(asked(f, called="f"), f, g, h, num_distractor_tools=2) == with_two
    assert outcomes(asked(f, called="f"), f, g, h, num_distractor_tools=5) == with_two | {"fewer_distractors": 2}
    assert outcomes(asked(f), f, num_distractor_tools=2)["no_distractors"] == 1
    long_tool = tool("f" * 1000)
    swapped = outcomes(asked(f, called="f"), long_tool, num_distractor_tools=1, max_length_tokens=500)
    assert swapped == {"unchanged_too_long": 1, "irrelevance_too_long": 1}
    said = {name for _, expected in found for name in expected} | with_two.keys() | swapped.keys()
    assert said | {"fewer_distractors", "no_distractors"} == OUTCOMES.keys()


def test_a_title_does_not_give_the_masked_name_away():
    schema = {"title": "PlaceArguments", "properties": {"place": {"title": "Place", "type": "string"}}}
    offered = {"name": "f", "description": "d", "parameters": schema}
    example = Example("id", (Message("user", "x"),), (offered,), (), "no", "", "train")
    assert "lace" not in str(mask_names(example, random.Random(1)).tools)
