"""The embedded dataset: valid, varied, divided, repeatable."""

import json
import random

import jsonschema
import pytest

from tasks.dataset.embedded.catalog import catalog
from tasks.dataset.embedded.generate import generate
from tasks.dataset.embedded.slots import Quoted, Words
from tasks.dataset.sources import hermes
from tests.dataset.reading import prepared, read


def rows(split="train", num_rows=200, **kwargs):
    return list(generate(split=split, num_rows=num_rows, seed=7, **kwargs))


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    settings = {"max_rows": 730, "num_test_rows": 130, "num_unseen_tools_rows": 40}
    return prepared(tmp_path_factory.mktemp("embedded") / "out", "embedded", **settings)


def of(split, name):
    return [example for example in split.test if example.slice == name]


def test_at_least_40_tools_over_10_domains_with_every_kind_of_schema():
    tools = catalog()
    assert len(tools) >= 40
    assert len({tool.domain for tool in tools}) >= 10
    assert len({tool.name for tool in tools}) == len(tools)
    for tool in tools:
        jsonschema.Draft202012Validator.check_schema(tool.schema["function"]["parameters"])
    schemas = json.dumps([tool.schema for tool in tools])
    for kind in ('"enum"', '"array"', '"object"', '"number"', '"integer"', '"date"', '"required"'):
        assert kind in schemas
    assert any(tool.optional for tool in tools)


def test_every_call_fits_its_schema(split):
    # Reading a row checks each call against the tools on offer; none was rejected, so check that the check bites.
    row = rows("train", 1)[0]
    answer = row["conversations"][2]["value"]
    row["conversations"][2]["value"] = answer.replace('"arguments": {', '"arguments": {"nonsense": 1, ')
    assert "<tool_call>" in answer
    with pytest.raises(ValueError, match="unknown_argument"):
        read(hermes, row)
    rows_of = split.quality["rows"]
    assert rows_of["rejected"] == {}
    assert len(split.train) + sum(rows_of["left_out"].values()) == 560
    assert len(split.train) > 550


def test_the_same_seed_writes_the_same_rows_and_more_rows_keep_the_earlier_ones():
    assert rows(num_rows=20) == rows(num_rows=200)[:20]
    assert list(generate(split="train", num_rows=20, seed=8)) != rows(num_rows=20)


def test_all_four_categories_are_there(split):
    categories = [example.category for example in of(split, "test")]
    assert sum(category != "no_fitting_tool" for category in categories) >= 100
    assert categories.count("no_fitting_tool") >= 20
    assert categories.count("parallel_calls") >= 10
    assert {example.category for example in split.train} == set(categories)


def test_tools_of_the_unseen_slice_are_never_offered_in_training(split):
    seen = {tool["name"] for example in [*split.train, *of(split, "test")] for tool in example.tools}
    unseen = {tool["name"] for example in of(split, "unseen_tools") for tool in example.tools}
    assert unseen
    assert not seen & unseen


def test_no_test_request_can_be_memorised(split):
    assert not {example.request for example in split.train} & {example.request for example in split.test}
    # Nothing had to be left out for it: the phrasings of training and test differ from the start.
    assert "shares_words_with_the_test" not in split.quality["rows"]["left_out"]
    assert split.quality["overlap"]["test"] == 0


def test_a_sentence_is_quoted_in_the_request_and_bare_in_the_call():
    slot = Quoted(Words(["see you soon"] * 4))
    assert slot.draw(random.Random(0), "train") == ('"see you soon"', "see you soon")


def test_too_many_rows_are_refused_rather_than_repeated():
    from tasks.dataset.embedded import generate as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_request", lambda *a: ("the same", []))
        with pytest.raises(ValueError, match="row 1 keeps repeating"):
            rows(num_rows=2)
