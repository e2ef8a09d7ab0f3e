"""Splits: nothing of the test in the training, whatever the source, and a row stays where it is."""

import random

import pytest

from tasks.dataset.features import normalised
from tasks.dataset.split import permutation
from tests.dataset.reading import Prepared, prepared, write_jsonl


def requests(example):
    return [message.content for message in example.messages if message.role == "user"]


def weather_row(request: str, tool: str = "get_weather", place: str = "Oslo") -> dict:
    parameters = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
    call = {"type": "function", "function": {"name": tool, "arguments": {"place": place}}}
    return {
        "tools": [{"type": "function", "function": {"name": tool, "description": "d", "parameters": parameters}}],
        "messages": [{"role": "user", "content": request}, {"role": "assistant", "tool_calls": [call]}],
    }


def various_rows(count: int, seed: int = 1) -> list[dict]:
    draw = random.Random(seed)
    words = [f"w{number}" for number in range(3000)]
    return [weather_row(" ".join(draw.sample(words, 12)), f"tool_{draw.randrange(30)}") for _ in range(count)]


@pytest.fixture(scope="module")
def glaive(glaive_rows, tmp_path_factory) -> Prepared:
    folder = tmp_path_factory.mktemp("split")
    rows = write_jsonl(folder / "rows.jsonl", glaive_rows)
    return prepared(folder / "out", rows, num_test_rows=40, num_unseen_tools_rows=10, test_share=0.2)


def test_no_test_request_is_taught(glaive):
    taught = {normalised(text) for example in glaive.train for text in requests(example)}
    asked = {normalised(example.request) for example in glaive.test}
    assert asked
    assert not taught & asked


def test_no_eight_words_of_the_test_stand_in_the_training(glaive):
    def runs(examples):
        texts = [normalised(text).split() for example in examples for text in requests(example)]
        return {tuple(words[i : i + 8]) for words in texts for i in range(len(words) - 7)}

    assert not runs(glaive.train) & runs(glaive.test)
    assert glaive.quality["rows"]["left_out"]["shares_words_with_the_test"] > 0


def test_conversations_with_one_opening_are_in_one_slice(glaive):
    def openings(examples):
        return {normalised(requests(example)[0]) for example in examples}

    assert not openings(glaive.train) & openings(glaive.test)


def test_unseen_tools_are_offered_nowhere_else(glaive):
    unseen = {tool["name"] for example in glaive.test if example.slice == "unseen_tools" for tool in example.tools}
    seen = [*glaive.train, *(example for example in glaive.test if example.slice == "test")]
    assert unseen
    assert not unseen & {tool["name"] for example in seen for tool in example.tools}


def test_every_row_is_in_a_slice_or_has_a_reason(glaive):
    glaive.assert_all_accounted_for(300)


def test_a_row_keeps_its_side_when_others_are_added(tmp_path):
    rows = various_rows(600)
    few = prepared(tmp_path / "few", write_jsonl(tmp_path / "few.jsonl", rows[:300]), num_test_rows=10_000)
    many = prepared(tmp_path / "many", write_jsonl(tmp_path / "many.jsonl", rows), num_test_rows=10_000)

    def side(result):
        return {e.request: e.slice for e in [*result.train, *result.test]}

    before, after = side(few), side(many)
    assert set(before.values()) == {"train", "test"}
    assert before == {request: after[request] for request in before}
    # A limit takes rows off the test, and gives none to the training.
    limited = prepared(tmp_path / "limited", str(tmp_path / "many.jsonl"), num_test_rows=20)
    assert {e.request for e in limited.train} == {e.request for e in many.train}
    assert len(limited.test) == 20


def test_another_seed_is_another_split(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", various_rows(200))
    one, other = (prepared(tmp_path / str(seed), rows, seed=seed) for seed in (1, 2))
    assert {e.request for e in one.test} != {e.request for e in other.test}


def test_equal_rows_and_nearly_equal_rows_stand_once_and_name_the_one_that_stays(tmp_path):
    rows = various_rows(100)
    words = rows[0]["messages"][0]["content"]
    longer = " ".join([words, *(f"filler{number}" for number in range(80))])
    tool = rows[0]["tools"][0]["function"]["name"]
    alike = [rows[0], weather_row(longer, tool), weather_row(longer.replace("filler79", "other"), tool)]
    elsewhere = weather_row(longer, "another_tool")
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, *alike, elsewhere])
    result = prepared(tmp_path / "out", path)
    left_out = {line["id"]: line for line in result.lines("left_out.jsonl") if "like" in line}
    assert {(line["reason"], line["id"], line["like"]) for line in left_out.values()} in (
        {("exact_duplicate", "rows-000100", "rows-000000"), ("near_duplicate", "rows-000101", "rows-000102")},
        {("exact_duplicate", "rows-000100", "rows-000000"), ("near_duplicate", "rows-000102", "rows-000101")},
    )
    kept_apart = prepared(tmp_path / "exact", path, near_duplicates=None)
    assert "near_duplicate" not in kept_apart.quality["rows"]["left_out"]


def test_of_two_that_are_nearly_equal_the_one_on_the_test_side_stays(tmp_path):
    # What a pair has in common is its own: each has fillers that no other pair has.
    texts = [" ".join(f"filler{n}x{number}" for number in range(90)) for n in range(40)]
    path = write_jsonl(
        tmp_path / "rows.jsonl", [weather_row(f"{word}{text}") for text in texts for word in ("one ", "two ")]
    )
    free = {"test_share": 0.5, "decontaminate_words": None}
    apart = prepared(tmp_path / "apart", path, near_duplicates=None, **free)
    side = {e.id: e.slice for e in [*apart.train, *apart.test]}
    together = prepared(tmp_path / "together", path, near_duplicates=0.9, **free)
    kept = {e.id: e.slice for e in [*together.train, *together.test]}
    crossing = 0
    for n in range(40):
        one, two = f"rows-{2 * n:06d}", f"rows-{2 * n + 1:06d}"
        assert (one in kept) != (two in kept)
        if side[one] != side[two]:
            crossing += 1
            assert {kept.get(one), kept.get(two)} == {"test", None}
    assert crossing > 5


def test_near_duplicates_are_found_behind_one_that_offers_other_tools(tmp_path):
    text = " ".join(f"filler{number}" for number in range(90))
    alike = [weather_row(f"{text} a", "one"), weather_row(f"{text} b", "one"), weather_row(f"{text} a", "two")]
    for seed in range(8):
        path = write_jsonl(tmp_path / f"{seed}.jsonl", [*alike, *various_rows(40)])
        result = prepared(tmp_path / str(seed), path, seed=seed, decontaminate_words=None)
        reasons = [line["reason"] for line in result.lines("left_out.jsonl")]
        assert reasons.count("near_duplicate") == 1


def test_requests_that_differ_by_a_sign_are_not_the_same(tmp_path):
    asked = [f"What is 5 {sign} 3?" for sign in "+-*/"] + ["What is C?", "What is C++?", "What is C#?"]
    rows = [*various_rows(40), *map(weather_row, asked)]
    result = prepared(tmp_path / "out", write_jsonl(tmp_path / "rows.jsonl", rows))
    assert {e.request for e in [*result.train, *result.test]} >= set(asked)
    shouted = [weather_row(text) for text in ("what is  c?", "WHAT IS C")]
    result = prepared(tmp_path / "again", write_jsonl(tmp_path / "more.jsonl", [*rows, *shouted]))
    assert result.quality["rows"]["left_out"]["exact_duplicate"] == 2


def test_a_conversation_that_comes_to_what_a_test_asks_is_not_taught(tmp_path):
    rows = [weather_row(f"Weather {n} now?") for n in range(100)]
    asked = prepared(tmp_path / "before", write_jsonl(tmp_path / "before.jsonl", rows)).test[0].request
    for n in range(20):
        row = weather_row(f"opening {n} of its own")
        again = [{"role": "tool", "content": "{}"}, {"role": "assistant", "content": "Done."}]
        rows.append(
            {**row, "messages": [*row["messages"], *again, {"role": "user", "content": asked}, row["messages"][1]]}
        )
    result = prepared(tmp_path / "out", write_jsonl(tmp_path / "rows.jsonl", rows), decontaminate_words=None)
    assert result.quality["rows"]["left_out"]["test_request_in_training"] > 10
    assert not any(asked in requests(example) for example in result.train)
    assert result.quality["overlap"]["exact_duplicates"] == 0


def test_what_training_and_test_have_in_common_would_be_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.dataset.split._decontaminate", lambda *arguments: None)
    rows = [weather_row(f"{n} a run of eight words that all of these share") for n in range(60)]
    result = prepared(tmp_path / "out", write_jsonl(tmp_path / "rows.jsonl", rows), near_duplicates=None)
    assert result.quality["overlap"]["test"] == 1
    assert result.quality["overlap"]["exact_duplicates"] == 0
    rows = various_rows(60)
    for row in rows:
        row["messages"][1:1] = [{"role": "assistant", "content": "And?"}, {"role": "user", "content": "The same?"}]
    result = prepared(tmp_path / "same", write_jsonl(tmp_path / "same.jsonl", rows))
    assert result.quality["overlap"]["exact_duplicates"] == len(result.test)


def test_a_limited_source_is_chosen_from_by_the_seed(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", various_rows(200))
    chosen = []
    for seed in (1, 2):
        result = prepared(tmp_path / str(seed), [{"name": path, "max_rows": 40}], seed=seed)
        chosen.append({e.id for e in [*result.train, *result.test]})
    assert len(chosen[0]) == len(chosen[1]) == 40
    assert chosen[0] != chosen[1]
    assert chosen[0] != {f"rows-{n:06d}" for n in range(40)}


def test_a_limit_of_one_source_takes_nothing_from_another(tmp_path):
    rows = various_rows(200)
    one, two = (write_jsonl(tmp_path / f"{name}.jsonl", rows) for name in ("one", "two"))
    result = prepared(tmp_path / "out", [{"name": one, "max_rows": 50}, {"name": two}])
    assert result.quality["rows"]["left_out"]["exact_duplicate"] == 50
    assert len(result.train) + len(result.test) == 200


def test_a_weighted_source_whose_rows_all_stand_in_another_is_told_so(tmp_path):
    one, two = (write_jsonl(tmp_path / f"{name}.jsonl", various_rows(50)) for name in ("one", "two"))
    with pytest.raises(
        ValueError, match=r"'.*two.jsonl' has a weight and no row to train on.*left out: 50 exact_duplicate\)"
    ):
        prepared(tmp_path / "out", [{"name": one, "weight": 1}, {"name": two, "weight": 1}])


@pytest.mark.parametrize("max_rows", range(31, 40))
def test_weights_never_exceed_max_rows(tmp_path, max_rows):
    names = [write_jsonl(tmp_path / f"{n}.jsonl", various_rows(100, seed=n)) for n in range(3)]
    result = prepared(tmp_path / "out", [{"name": n, "weight": 1} for n in names], max_rows=max_rows, num_test_rows=10)
    assert len(result.train) + len(result.test) == max_rows


def test_unseen_tools_of_the_embedded_rows_are_not_taught_by_another_source(tmp_path):
    embedded = {"max_rows": 300, "num_test_rows": 40, "num_unseen_tools_rows": 20}
    alone = prepared(tmp_path / "alone", "embedded", **embedded)
    unseen = sorted({t["name"] for e in alone.test if e.slice == "unseen_tools" for t in e.tools})
    rows = [weather_row(f"unique request number {n}", tool) for n, tool in enumerate(unseen)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    mixed = prepared(tmp_path / "mixed", ["embedded", path], **embedded, unseen_tools_share=0.0001)
    assert unseen
    assert not {t["name"] for e in mixed.train for t in e.tools} & set(unseen)


def test_a_benchmark_that_stands_in_the_training_is_found(tmp_path):
    rows = various_rows(100)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    taught = prepared(tmp_path / "before", path).train[3]
    copied = taught.request
    (tmp_path / "BFCL_x.json").write_text(
        f'{{"id": "a", "question": [[{{"role": "user", "content": "Please: {copied}!"}}]], "function": []}}\n'
        '{"id": "b", "question": [[{"role": "user", "content": "Something else."}]]}\n'
    )
    with (tmp_path / "BFCL_x.json").open("a") as file:
        file.write('{"id": "c", "question": "Weather in Oslo?"}\n')
    short = weather_row("weather in oslo")
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, short])
    result = prepared(tmp_path / "out", path, benchmarks=[str(tmp_path / "BFCL_x.json")])
    reasons = {line["id"]: line["reason"] for line in result.lines("left_out.jsonl")}
    assert reasons[taught.id] == "shares_words_with_a_benchmark"
    assert reasons["rows-000100"] == "shares_words_with_a_benchmark"
    assert list(reasons.values()).count("shares_words_with_a_benchmark") == 2


def test_the_questions_of_bfcl_are_read_off_its_package(tmp_path):
    pytest.importorskip("bfcl_eval", reason="bfcl-eval is not installed; it carries the benchmark")
    question = "Find the area of a triangle with a base of 10 units and height of 5 units."
    rows = [*various_rows(100), *(weather_row(f"{text} {question}") for text in ("Please:", "Hello,", "Now"))]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    result = prepared(tmp_path / "out", path, benchmarks=["bfcl"], near_duplicates=None)
    assert result.quality["rows"]["left_out"]["shares_words_with_a_benchmark"] >= 1
    assert not any("area of a triangle" in example.request for example in result.train)


def test_too_few_rows_are_refused_with_the_counts(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", various_rows(3))
    with pytest.raises(ValueError, match=r"3 usable rows leave 3 to train on and 0 to test with.*dataset\.test_share"):
        prepared(tmp_path / "out", rows, test_share=0.0001)


def test_fewer_test_rows_than_asked_for_are_said(tmp_path):
    result = prepared(tmp_path / "out", write_jsonl(tmp_path / "rows.jsonl", various_rows(100)), num_test_rows=90)
    assert f"{len(result.test)} of dataset.num_test_rows=90" in result.quality["notes"][0]
    assert "Fewer than asked for" in (result.folder / "quality.md").read_text()


def test_a_permutation_keeps_nothing_in_place():
    for count in (2, 3, 50):
        moved = permutation(count, seed=1)
        assert sorted(moved) == list(range(count))
        assert all(i != j for i, j in enumerate(moved))
