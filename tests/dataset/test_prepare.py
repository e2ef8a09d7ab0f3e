"""Preparation as a whole: every format and kind of file, mixtures, packs, several workers, nothing lost."""

import csv
import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.contracts.overrides import SettingsError, read_experiment
from tasks.contracts.settings import DatasetSettings
from tasks.dataset.packing import pack
from tasks.dataset.rendering.encode import Encoder, EncodingDiffers
from tasks.dataset.sources.files import DatasetNotFound
from tasks.dataset.sources.formats import UnknownFormat
from tasks.dataset.sources.read import check_dataset
from tasks.dataset.stored import IGNORED
from tests.dataset.reading import BYTES, prepared, write_jsonl
from tests.dataset.test_split import various_rows


def as_format(name: str, request: str, tool: dict, call: dict) -> dict:
    """One conversation as each format writes it."""
    wrapped = json.dumps([{"type": "function", "function": tool}])
    text = json.dumps(call)
    match name:
        case "openai":
            turn = {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
            return {"tools": json.loads(wrapped), "messages": [{"role": "user", "content": request}, turn]}
        case "hermes":
            answer = f"<tool_call>\n{text}\n</tool_call>"
            turns = [("system", "<tools></tools>"), ("human", request), ("gpt", answer)]
        case "sharegpt":
            turns = [("human", request), ("function_call", text)]
        case "glaive":
            quoted = f'{{"name": "{call["name"]}", "arguments": \'{json.dumps(call["arguments"])}\'}}'
            chat = f"USER: {request}\n\n\nASSISTANT: <functioncall> {quoted} <|endoftext|>\n\n\n"
            return {"system": f"SYSTEM: Use them if required -\n{json.dumps(tool)}\n", "chat": chat}
        case "xlam":
            flat = {n: {"type": "str", "description": ""} for n in tool["parameters"]["properties"]}
            tools = [{"name": tool["name"], "description": tool["description"], "parameters": flat}]
            return {"query": request, "answers": json.dumps([call]), "tools": json.dumps(tools)}
        case "toolace":
            answer = f"[{call['name']}({', '.join(f'{k}={v!r}' for k, v in call['arguments'].items())})]"
            turns = [("user", request), ("assistant", answer)]
            return {
                "system": f"You can invoke:\n{json.dumps([tool])}. \nDo.",
                "conversations": [{"from": role, "value": value} for role, value in turns],
            }
    return {"tools": wrapped, "conversations": [{"from": role, "value": value} for role, value in turns]}


@pytest.mark.parametrize("name", ["openai", "hermes", "sharegpt", "glaive", "xlam", "toolace"])
def test_every_format_is_recognised_and_read_alike(tmp_path, name):
    rows = []
    for row in various_rows(60):
        tool, call = row["tools"][0]["function"], row["messages"][1]["tool_calls"][0]["function"]
        rows.append(as_format(name, row["messages"][0]["content"], tool, call))
    result = prepared(tmp_path / "out", write_jsonl(tmp_path / "rows.jsonl", rows))
    result.assert_all_accounted_for(60)
    assert result.quality["rows"]["rejected"] == {}
    expected = {r["messages"][0]["content"]: r["tools"][0]["function"]["name"] for r in various_rows(60)}
    for example in [*result.train, *result.test]:
        (call,) = example.expected
        assert (call.name, call.arguments) == (expected[example.request], {"place": "Oslo"})


def test_every_kind_of_file_holds_the_same_rows(tmp_path):
    rows = [as_format("hermes", r["messages"][0]["content"], r["tools"][0]["function"], r["messages"][1]["tool_calls"][0]
                      ["function"]) for r in various_rows(80)]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    write_jsonl(tmp_path / "rows.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["conversations", "tools"])
        writer.writeheader()
        writer.writerows(
            {name: json.dumps(value) if name != "tools" else value for name, value in r.items()} for r in rows
        )
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "rows.jsonl", rows)
    (folder / "notes.txt").write_text("not rows")
    names = [str(tmp_path / f"rows.{kind}") for kind in ("json", "jsonl", "parquet", "csv")]
    names += [str(folder), f"file://{tmp_path}/rows.jsonl"]
    results = [prepared(tmp_path / f"out{number}", name) for number, name in enumerate(names)]
    tokens = results[0].tokens
    assert tokens.num_rows > 50
    for result in results[1:]:
        assert result.tokens.equals(tokens)
        assert [e.messages for e in result.test] == [e.messages for e in results[0].test]


def test_several_workers_write_the_same_bytes_as_one(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [*various_rows(2000), *various_rows(50, seed=2)])
    one, two = (prepared(tmp_path / str(number), rows, num_workers=number) for number in (1, 2))
    names = sorted(path.name for path in one.folder.iterdir())
    assert names == sorted(path.name for path in two.folder.iterdir())
    for name in names:
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes(), name


def test_the_labels_are_the_answers(tmp_path):
    result = prepared(tmp_path / "out", write_jsonl(tmp_path / "rows.jsonl", various_rows(50)))
    taught = set()
    for ids, labels in zip(*(result.tokens[name].to_pylist() for name in ("input_ids", "labels")), strict=True):
        counted = [i for i, label in zip(ids, labels, strict=True) if label != IGNORED]
        assert all(label in (i, IGNORED) for i, label in zip(ids, labels, strict=True))
        taught.add("".join(BYTES.id_to_token(i) for i in counted).replace("Ġ", " "))
    expected = {f'<tool_call>{{"name": "{e.expected[0].name}", "arguments": {{"place": "Oslo"}}}}</tool_call><|im_end|>'
                for e in result.train}  # fmt: skip
    assert taught == expected


class TestMixtures:
    @pytest.fixture
    def sources(self, tmp_path):
        one = write_jsonl(tmp_path / "one.jsonl", various_rows(300, seed=1))
        two = write_jsonl(tmp_path / "two.jsonl", various_rows(100, seed=2))
        return one, two

    def taught(self, result):
        return {name: counts["taught"] for name, counts in result.quality["sources"].items()}

    def test_weights_share_out_the_training_rows(self, sources, tmp_path):
        one, two = sources
        mixture = [{"name": one, "weight": 1}, {"name": two, "weight": 3}]
        result = prepared(tmp_path / "out", mixture, max_rows=90, num_test_rows=30)
        assert self.taught(result) == {one: 15, two: 45}
        # Without a limit: as many rows as keep the shares.
        result = prepared(tmp_path / "all", mixture, num_test_rows=30)
        counts = self.taught(result)
        assert counts[two] > 80
        assert abs(counts[two] - 3 * counts[one]) <= 3

    def test_a_source_can_be_limited(self, sources, tmp_path):
        one, two = sources
        result = prepared(tmp_path / "out", [{"name": one, "max_rows": 40}, {"name": two}])
        rows = [e for e in [*result.train, *result.test] if e.source == "one.jsonl"]
        assert len(rows) == 40
        result.assert_all_accounted_for(400)

    def test_files_of_one_name_keep_their_rows_apart(self, tmp_path):
        for number in (1, 2):
            (tmp_path / str(number)).mkdir()
            write_jsonl(tmp_path / str(number) / "rows.jsonl", various_rows(50, seed=number))
        result = prepared(tmp_path / "out", [str(tmp_path / "1" / "rows.jsonl"), str(tmp_path / "2" / "rows.jsonl")])
        assert len({e.id for e in [*result.train, *result.test]}) == 100

    @pytest.mark.parametrize(
        ("sources", "message"),
        [
            ([{"name": "a.jsonl", "weight": 1}, {"name": "b.jsonl"}], "give all of them one, or none"),
            (["a.jsonl", "a.jsonl"], "stand twice"),
            ([], "at least 1 item"),
            ("embedded", "needs max_rows"),
            ([{"name": "embedded", "max_rows": 50}], "embedded with max_rows=50 leaves nothing"),
        ],
    )
    def test_sources_that_cannot_be_mixed_are_refused(self, sources, message):
        sizes = {} if sources == "embedded" else {"max_rows": 500}
        with pytest.raises(SettingsError, match=message):
            read_experiment({"model": {"name": "embedded"}, "dataset": {"sources": sources} | sizes})


def test_max_rows_chooses_by_the_seed(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", various_rows(400))
    results = [
        prepared(tmp_path / str(i), rows, max_rows=150, num_test_rows=20, seed=s) for i, s in enumerate((5, 5, 6))
    ]
    chosen = [{e.request for e in [*result.train, *result.test]} for result in results]
    assert len(chosen[0]) == 150
    assert chosen[0] == chosen[1] != chosen[2]


def test_packs_hold_every_row_once_and_whole(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", various_rows(200))
    result = prepared(tmp_path / "out", rows, max_length_tokens=700, packing_length_tokens=2000)
    lengths = [len(ids) for ids in result.tokens["input_ids"].to_pylist()]
    with pa.OSFile(str(result.folder / "packs.arrow")) as file:
        packs = pa.ipc.open_stream(file).read_all()["rows"].to_pylist()
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in rows) <= 2000 for rows in packs)
    assert result.manifest["num_packs"] == len(packs) == result.quality["packing"]["packs"]


def test_the_reports_lengths_are_those_of_the_rows_that_are_written(tmp_path):
    result = prepared(
        tmp_path / "out", write_jsonl(tmp_path / "rows.jsonl", various_rows(200)), max_rows=90, num_test_rows=9
    )
    lengths = [len(ids) for ids in result.tokens["input_ids"].to_pylist()]
    reported = result.quality["tokens"]["train"]
    assert (reported["total"], reported["max"]) == (sum(lengths), max(lengths))


def test_every_chunk_is_held_against_the_tokenizers_library(tmp_path, monkeypatch):
    def differs(self, segments):
        raise EncodingDiffers("seen")

    monkeypatch.setattr(Encoder, "check", differs)
    with pytest.raises(EncodingDiffers, match="seen"):
        prepared(tmp_path / "out", write_jsonl(tmp_path / "rows.jsonl", various_rows(20)))
    assert not (tmp_path / "out" / ".work").exists()


def test_packing_is_best_fit_decreasing():
    assert pack([5, 3, 6, 4, 2], 10) == [[2, 3], [0, 1, 4]]
    assert pack([], 10) == []
    with pytest.raises(ValueError, match="row 1 has 11 tokens and a pack holds 10"):
        pack([1, 11], 10)


def test_packing_is_as_tight_as_trls():
    pack_dataset = pytest.importorskip("trl.data_utils").pack_dataset
    from datasets import Dataset

    lengths = np.random.default_rng(1).lognormal(5.5, 0.8, 3000).astype(int).clip(10, 2048)
    theirs = pack_dataset(Dataset.from_dict({"input_ids": [[0] * n for n in lengths]}), 2048, strategy="bfd")
    # Theirs packs every thousand rows by themselves.
    assert len(theirs) * 0.99 < len(pack(lengths, 2048)) <= len(theirs)


def test_every_call_turn_can_be_asked(tmp_path):
    rows = []
    for row in various_rows(60):
        again = {"role": "user", "content": row["messages"][0]["content"][::-1]}
        row["messages"] += [{"role": "tool", "content": "{}"}, {"role": "assistant", "content": "Done."}, again]
        row["messages"].append(row["messages"][1])
        rows.append(row)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    once, twice = (prepared(tmp_path / turns, path, test_turns=turns) for turns in ("first_call", "every_call"))
    assert len(twice.test) == 2 * len(once.test)
    assert {e.id for e in twice.test} == {e.id for e in once.test} | {f"{e.id}.2" for e in once.test}
    assert all(len(e.expected) == 1 for e in twice.test)
    assert once.manifest["num_test_rows"] == len(once.test)


def test_repairs_are_counted_and_the_row_is_kept(tmp_path):
    rows = [as_format("hermes", r["messages"][0]["content"], r["tools"][0]["function"], r["messages"][1]["tool_calls"][0]
                      ["function"]) for r in various_rows(40)]  # fmt: skip
    tool = json.loads(rows[0]["tools"])[0]["function"]["name"]
    for text, row in zip(
        [
            f"{{'name': '{tool}', 'arguments': {{'place': 'Oslo'}}}}",
            f'{{"name": "{tool}", "arguments": {{"place": "Oslo",}}}}',
            f'\\n{{"name": "{tool}", "arguments": {{"place": "a\\nb",}}}}\\n',
        ],
        rows,
        strict=False,
    ):
        row["tools"] = rows[0]["tools"]
        row["conversations"][2]["value"] = f"Sure. <tool_call>{text}</tool_call>"
    result = prepared(tmp_path / "out", write_jsonl(tmp_path / "rows.jsonl", rows))
    repairs = {"python_literal": 2, "trailing_comma": 1, "literal_newline": 1, "words_beside_a_call": 3}
    assert result.quality["repairs"] == repairs
    assert "place" in json.dumps([dict(c.arguments) for e in result.train for c in e.expected])
    assert "Repaired while reading: 3 words_beside_a_call" in (result.folder / "quality.md").read_text()


def test_a_rejected_row_is_in_the_quarantine_file_as_it_was(tmp_path):
    rows = [*various_rows(30), {"messages": [{"role": "user", "content": "é"}, {"role": "critic", "content": "x"}]}]
    result = prepared(tmp_path / "out", write_jsonl(tmp_path / "rows.jsonl", rows))
    (line,) = result.lines("rejected.jsonl")
    assert (line["id"], line["reason"]) == ("rows-000030", "unknown_role")
    assert json.loads(line["row"]) == rows[-1]


@pytest.mark.parametrize("name", ["/no/such/file.jsonl", "./nothing.json", "s3x://bucket/rows"])
def test_a_dataset_that_is_not_there_is_named(name):
    with pytest.raises(DatasetNotFound, match=f"dataset.sources='{name}'"):
        check_dataset(DatasetSettings(sources=name))


def test_a_folder_without_rows_and_rows_of_no_format_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DatasetNotFound, match=r"holds no \.jsonl"):
        check_dataset(DatasetSettings(sources=str(tmp_path / "folder")))
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "hello"}] * 5)
    with pytest.raises(UnknownFormat, match=r"first 5 rows look like none of.*columns: text"):
        prepared(tmp_path / "out", path)


def test_no_usable_row_says_what_was_wrong(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "Hi"}]}] * 5)
    with pytest.raises(DatasetNotFound, match=r"(?s)none of the 5 rows.*5 no_answer.*rows-000000: no_answer"):
        prepared(tmp_path / "out", path)


def test_the_same_rows_and_settings_are_the_same_tokens_on_any_machine(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", various_rows(100))
    tokens = prepared(tmp_path / "out", rows, num_test_rows=10).tokens.to_pylist()
    digest = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
    assert digest == "2b5c026fb0169c94fe5ca54316a9504233f920860204600cd234922900b62194"
