"""Splits: nothing of the test in the training, whatever the source."""

from collections import Counter

import pytest

from tasks.contracts.settings import DatasetSettings
from tasks.dataset.prepare import prepare
from tasks.dataset.sources import sharegpt
from tasks.dataset.sources.rows import RowRejected
from tasks.dataset.split import normalised, permutation, requests, split_source, to_example


def examples_of(rows):
    examples = []
    for index, row in enumerate(rows):
        try:
            examples.append(to_example(f"row-{index:04d}", sharegpt.read(row), "glaive"))
        except RowRejected:
            continue
    return examples


@pytest.fixture
def split(glaive_rows):
    settings = DatasetSettings(name="x.json", format="sharegpt", num_test_rows=40, num_unseen_tools_rows=10)
    return split_source(examples_of(glaive_rows), settings)


def test_no_test_request_is_taught(split):
    taught = {normalised(text) for example in split.train for text in requests(example)}
    assert not taught & {normalised(e.request) for e in [*split.test, *split.unseen_tools]}


def test_conversations_with_one_opening_are_in_one_slice(split):
    def openings(examples):
        return {normalised(requests(example)[0]) for example in examples}

    assert not openings(split.train) & openings(split.test)


def test_unseen_tools_are_offered_nowhere_else(split):
    unseen = {tool["name"] for example in split.unseen_tools for tool in example.tools}
    assert unseen
    assert not unseen & {t["name"] for e in [*split.train, *split.test] for t in e.tools}


def test_every_row_is_in_a_slice_or_counted(split, glaive_rows):
    kept = len(split.train) + len(split.test) + len(split.unseen_tools)
    assert kept + sum(split.left_out.values()) == len(examples_of(glaive_rows))


def test_too_few_rows_for_the_test_are_refused(glaive_rows):
    settings = DatasetSettings(name="x.json", format="sharegpt", num_test_rows=300)
    with pytest.raises(ValueError, match=r"lower dataset\.num_test_rows"):
        split_source(examples_of(glaive_rows), settings)


def test_a_permutation_keeps_nothing_in_place():
    for count in (2, 3, 50):
        moved = permutation(count, seed=1)
        assert sorted(moved) == list(range(count))
        assert all(i != j for i, j in enumerate(moved))


@pytest.mark.integration
def test_preparing_real_rows_accounts_for_every_one(glaive_rows, embedded_model, tmp_path):
    import json

    from tasks.dataset.rendering.family import FAMILIES
    from tasks.models.load import load_tokenizer

    source = tmp_path / "rows.json"
    source.write_text(json.dumps(glaive_rows))
    settings = DatasetSettings(name=str(source), format="sharegpt", num_test_rows=40, max_length_tokens=700)
    prepare(settings, FAMILIES["smollm2"], load_tokenizer(embedded_model), tmp_path / "out")
    quality = json.loads((tmp_path / "out" / "quality.json").read_text())
    rows = quality["rows"]
    kept = rows["train"] + rows["test"] + rows["unseen_tools"]
    assert rows["read"] == 300
    assert kept + sum(rows["rejected"].values()) + sum(rows["left_out"].values()) == 300
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert Counter(reasons) == rows["rejected"]
    assert rows["rejected"]["too_long"] > 0
    assert quality["tokens"]["train"]["max"] <= 700
    assert quality["overlap"]["exact_duplicates"] == 0


@pytest.mark.integration
def test_a_dataset_with_no_usable_row_says_what_was_wrong(embedded_model, tmp_path):
    from tasks.dataset.rendering.family import FAMILIES
    from tasks.models.load import load_tokenizer

    source = tmp_path / "rows.jsonl"
    source.write_text('{"text": "hello"}\n' * 5)
    with pytest.raises(ValueError, match=r"(?s)none of the 5 rows.*5 no_conversation.*dataset\.format"):
        prepare(
            DatasetSettings(name=str(source)), FAMILIES["smollm2"], load_tokenizer(embedded_model), tmp_path / "out"
        )
