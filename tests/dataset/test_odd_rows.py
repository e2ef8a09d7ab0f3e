"""One odd row among good ones: it is rejected with its reason or kept as it is, and the others are not lost for it."""

import ast
import datetime
import decimal
import gc
import json
import re
import subprocess
import sys
import time
import types

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.local_stack import REPOSITORY
from tasks.contracts.settings import DatasetSettings
from tasks.dataset import convert, split
from tasks.dataset.convert import Converter
from tasks.dataset.quality import EXPLAINED
from tasks.dataset.rendering.family import FAMILIES
from tasks.dataset.sources.read import Chunk
from tests.dataset.reading import BYTES, prepared, write_jsonl
from tests.dataset.test_prepare import as_format
from tests.dataset.test_split import various_rows, weather_row


@pytest.fixture(scope="module")
def convert_one(tmp_path_factory):
    """What becomes of one row in each family: ``kept`` or its reason."""
    tokenizer = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    BYTES.save(str(tokenizer))
    settings = DatasetSettings(sources=["x.jsonl"], max_length_tokens=1_000_000)
    converters = [Converter(settings, family, tokenizer) for family in FAMILIES.values()]

    def convert_one(raw, format_="openai"):
        found = set()
        for converter in converters:
            done = converter(Chunk(0, format_, [("x-0", raw)]))
            found.add("kept" if len(done.batch) else done.rejected[0].reason)
        return found

    return convert_one


def with_tool(**parameters):
    """A good row that offers a further tool, which is never called."""
    row = weather_row("Weather?")
    row["tools"].append({"type": "function", "function": {"name": "other", "parameters": parameters}})
    return json.dumps(row).encode()


@pytest.mark.parametrize(
    "parameters",
    [
        {"required": [["a"]]},
        {"required": 3},
        {"required": "place"},
        {"properties": {"a": None}},
        {"properties": {"a": 3}},
        {"properties": {"a": "string"}},
        {"properties": {"a": {"enum": 5}}},
        {"properties": {"a": {"items": [{}]}}},
        {"properties": {"a": {"type": ["string", None]}}},
        {"properties": {"a": {"type": {}}}},
        {"properties": {"a": {"properties": [1]}}},
        {"properties": [1]},
        {"$ref": "#/properties/a", "properties": {"a": {"$ref": "#/properties/a"}}},
        {"properties": {"a": {"$ref": "http://127.0.0.1:1/x"}}},
        {"anyOf": {}},
    ],
)
def test_a_schema_that_is_none_is_bad_tools_in_every_family_called_or_not(convert_one, parameters):
    assert convert_one(with_tool(**parameters)) == {"bad_tools"}


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"a": {"type": ["string", "null"]}}},
        {"properties": {"required": {"type": "string"}, "enum": {"type": "string"}, "pattern": {"type": "string"}}},
        {"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"type": "string"}}},
        {"properties": {"a": {"additionalProperties": False, "anyOf": [{"type": "string"}, {"type": "null"}]}}},
    ],
)
def test_a_schema_that_is_one_is_kept_in_every_family(convert_one, parameters):
    assert convert_one(with_tool(**parameters)) == {"kept"}


@pytest.mark.parametrize(
    ("raw", "format_", "reason"),
    [
        ({"messages": "x", "tools": datetime.datetime(2024, 1, 1)}, "openai", "no_conversation"),
        (b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}", "openai", "bad_turn"),
        ({"system": "[" + '{"name":"f","parameters":' * 600, "conversations": [{}]}, "toolace", "bad_tools"),
    ],
)
def test_rows_of_odd_types_have_a_reason(convert_one, raw, format_, reason):
    assert convert_one(raw, format_) == {reason}


def test_a_hexadecimal_number_that_no_json_could_hold(convert_one):
    tool = weather_row("x")["tools"][0]["function"]
    row = as_format("hermes", "Hi there", tool, {})
    row["conversations"][2]["value"] = (
        f"<tool_call>{{'name': 'get_weather', 'arguments': {{'place': 0x{'f' * 6000}}}}}</tool_call>"
    )
    assert convert_one(json.dumps(row).encode(), "hermes") == {"reader_failed"}


def test_a_fault_of_a_reader_costs_one_row_and_says_so(tmp_path, monkeypatch):
    def broken(row, repairs):
        if "poison" in str(row):
            raise KeyError("a fault")
        return original(row, repairs)

    original = convert.FORMATS["openai"]
    monkeypatch.setitem(convert.FORMATS, "openai", broken)
    rows = [*various_rows(60), weather_row("poison")]
    result = prepared(tmp_path / "out", write_jsonl(tmp_path / "rows.jsonl", rows))
    (line,) = result.lines("rejected.jsonl")
    assert line["reason"] == "reader_failed"
    assert "KeyError: 'a fault'; a fault of the reader, please report the row" in line["detail"]
    assert json.loads(line["row"]) == rows[-1]


def test_a_rejected_row_keeps_no_row_around_it_in_memory(tmp_path):
    """Workers look for cycles seldom; an error in one would hold its whole chunk."""
    BYTES.save(str(tmp_path / "tokenizer.json"))
    settings = DatasetSettings(sources=["rows.jsonl"])
    converter = Converter(settings, FAMILIES["smollm2"], tmp_path / "tokenizer.json")
    rows = [weather_row("x") for _ in range(7)]
    rows[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["place"] = 5
    rows[1]["messages"][1]["tool_calls"][0]["function"]["arguments"] = "{'place': f(x)}"
    rows[2]["messages"][1]["tool_calls"][0]["function"]["arguments"] = "{'place': [}"
    rows[3]["tools"] = "[{"
    rows[4]["messages"][0]["role"] = "alien"
    rows[5]["tools"][0]["function"]["parameters"]["required"] = 5
    rows[6]["messages"][0]["content"] = "\ud800"
    lines = [*(json.dumps(row).encode() for row in rows), b"{", b"\xff", b"[1]"]
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        done = converter(Chunk(0, "openai", [(str(n), line) for n, line in enumerate(lines)]))
        gc.collect()
        held = [thing for thing in gc.garbage if isinstance(thing, types.FrameType | types.TracebackType)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert len(done.rejected) == len(lines)
    assert not held


@pytest.mark.parametrize("arguments_are_text", [True, False])
def test_structs_of_parquet_are_read_as_the_rows_were(tmp_path, arguments_are_text):
    rows = various_rows(40)
    for number, row in enumerate(rows):
        function = row["tools"][0]["function"]
        if number % 2:
            function["parameters"] = {
                "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
            }  # fmt: skip
            row["messages"][1]["tool_calls"][0]["function"]["arguments"] = {"city": "Oslo"}
        if arguments_are_text:
            call = row["messages"][1]["tool_calls"][0]["function"]
            call["arguments"] = json.dumps(call["arguments"])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    from_parquet = prepared(tmp_path / "a", str(tmp_path / "rows.parquet"))
    from_lines = prepared(tmp_path / "b", write_jsonl(tmp_path / "rows.jsonl", rows))
    assert from_parquet.quality["rows"]["rejected"] == {}
    assert from_parquet.tokens.equals(from_lines.tokens)


def test_parquet_values_that_json_has_not_and_damaged_text(tmp_path):
    rows = various_rows(20)
    for row in rows:
        row["tools"] = json.dumps(row["tools"])
        call = row["messages"][1]["tool_calls"][0]["function"]
        call["arguments"] = json.dumps(call["arguments"])
        row["when"] = datetime.datetime(2024, 1, 1)
    good = pa.Table.from_pylist(rows)
    pq.write_table(good, tmp_path / "unused.parquet")
    assert prepared(tmp_path / "a", str(tmp_path / "unused.parquet")).quality["rows"]["rejected"] == {}
    odd = pa.Table.from_pylist([{**row, "tools": decimal.Decimal("1.5")} for row in rows])
    pq.write_table(odd, tmp_path / "odd.parquet")
    with pytest.raises(ValueError, match=r"(?s)20 not_json.*tools holds Decimal\('1\.50*'\)"):
        prepared(tmp_path / "b", [{"name": str(tmp_path / "odd.parquet"), "format": "openai"}])
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\3\0\0\0"), pa.py_buffer(b"\xff\xfe\xfd"))
    column = pa.chunked_array([good["tools"].combine_chunks(), bad])
    table = pa.table(
        {"messages": pa.chunked_array([*good["messages"].chunks, good["messages"].chunks[0][:1]]), "tools": column}
    )
    pq.write_table(table, tmp_path / "bytes.parquet")
    assert prepared(tmp_path / "c", str(tmp_path / "bytes.parquet")).quality["rows"]["rejected"] == {"not_utf8": 1}


@pytest.mark.parametrize(
    "trap",
    [
        lambda: {"tools": '"' + '\\"' * 200_000},
        lambda: {"tools": "{" + ",".join(f'"{n}": 1' for n in range(50_000)) + ', "1": 2}'},
        lambda: with_tool_of(allOf=[{"$ref": "#/$defs/0"}], **{"$defs": chain(40)}),
        lambda: with_tool_of(
            properties={"place": {"additionalProperties": False, "patternProperties": {"^(a+)+$": {}}}},
            place={"a" * 40 + "!": 1},
        ),
        lambda: with_tool_of(properties={"place": {"uniqueItems": True}}, place=[{"n": n} for n in range(3000)]),
        lambda: with_tool_of(
            properties={"place": {"items": {"enum": list(range(100_000))}}}, place=list(range(5000, 9000))
        ),
    ],
    ids=["quotes", "keys", "references", "patterns", "unique", "enum"],
)
def test_a_small_row_that_would_take_hours_takes_no_time(convert_one, trap):
    row = weather_row("Weather?") | trap()
    began = time.monotonic()
    convert_one(json.dumps(row).encode())
    # All families; a single one of these took from minutes to for ever.
    assert time.monotonic() - began < 20


def chain(length):
    """Each definition refers to the next one twice."""
    twice = {str(n): {"allOf": [{"$ref": f"#/$defs/{n + 1}"}] * 2} for n in range(length)}
    return twice | {str(length): {}}


def with_tool_of(place="Oslo", **parameters):
    row = weather_row("Weather?", place=place)
    row["tools"][0]["function"]["parameters"] = {"type": "object", "properties": {"place": {}}} | parameters
    return row


class TestInspect:
    def run(self, *arguments):
        done = subprocess.run(
            [sys.executable, "-m", "tasks.dataset", "inspect", *arguments],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def test_a_few_rows_are_shown_with_reasons_and_as_the_model_sees_them(self, tmp_path):
        rows = [*various_rows(3), {"messages": [{"role": "user", "content": "x"}, {"role": "\ud800", "content": "y"}]}]
        done = self.run(write_jsonl(tmp_path / "rows.jsonl", rows))
        assert done.returncode == 0
        assert "4 rows read: 1 rejected" in done.stdout
        assert "rows-000003 '\\ud800'" in done.stdout
        assert "mean words" in done.stdout
        assert "mean tokens" not in done.stdout
        assert "<|im_start|>user" in done.stdout
        assert re.search(r"assistant\n\[\[\[<tool_call>\n.*\n</tool_call><\|im_end\|>\]\]\]$", done.stdout)

    def test_of_a_long_conversation_the_answer_is_shown_as_well_as_the_tools(self, tmp_path):
        rows = various_rows(30)
        for row in rows:
            row["tools"][0]["function"]["description"] = "x" * 5000
        done = self.run(write_jsonl(tmp_path / "rows.jsonl", rows))
        assert "characters left out here" in done.stdout
        assert '"type": "function"' in done.stdout
        assert done.stdout.rstrip().endswith("</tool_call><|im_end|>]]]")

    @pytest.mark.integration
    def test_with_a_model_its_tokens_are_counted(self, embedded_model, tmp_path):
        path = write_jsonl(tmp_path / "rows.jsonl", various_rows(30))
        done = self.run(path, "--model", str(embedded_model), "--keep", str(tmp_path / "kept"))
        assert done.returncode == 0
        assert "mean tokens" in done.stdout
        assert (tmp_path / "kept" / "train.arrow").exists()
        assert self.run(path, "--keep", str(tmp_path / "kept")).returncode == 2

    @pytest.mark.parametrize(
        ("name", "content", "status", "said"),
        [
            ("nothing.jsonl", None, 1, "no such file"),
            ("empty.jsonl", "", 1, "holds no rows"),
            ("rows.csv", "query,answers\n", 1, "holds no rows"),
            ("rows.jsonl", "{}\n", 1, "look like none of"),
            ("rows.jsonl", '{"messages": [\n' * 3, 1, "none of the first 3 rows can be read; the first: not_json"),
        ],
    )
    def test_what_is_no_dataset_is_named(self, tmp_path, name, content, status, said):
        if content is not None:
            (tmp_path / name).write_text(content)
        done = self.run(str(tmp_path / name))
        assert done.returncode == status
        assert said in done.stderr

    def test_settings_are_checked(self):
        done = self.run("rows.jsonl", "--set", "max_length_tokens=1")
        assert done.returncode == 2
        assert "max_length_tokens=1" in done.stderr


def test_every_reason_is_explained():
    """The report and ``inspect`` look each reason up."""
    used = set()
    for path in [*REPOSITORY.glob("tasks/dataset/**/*.py"), REPOSITORY / "tasks" / "contracts" / "call_check.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
                "RowRejected",
                "CallProblem",
                "Unread",
                "load",
            ):
                used |= {a.value for a in node.args[:2] if isinstance(a, ast.Constant) and "_" in str(a.value)}
    used |= {value for name, value in vars(split).items() if name.isupper() and isinstance(value, str)}
    assert len(used) > 25
    assert used | {"reader_failed"} == EXPLAINED.keys()


def test_rows_behind_a_url_of_fsspec(tmp_path):
    files = fsspec.filesystem("memory")
    files.pipe("/rows/a.jsonl", "".join(json.dumps(row) + "\n" for row in various_rows(60)).encode())
    result = prepared(tmp_path / "out", "memory://rows")
    result.assert_all_accounted_for(60)
    assert result.quality["rows"]["rejected"] == {}
    with pytest.raises(ValueError, match=r"no such file or folder \(/nothing\)"):
        prepared(tmp_path / "missing", "memory://nothing")


def test_rows_of_the_hub(tmp_path, monkeypatch):
    """The hub is not here; what its library gives is real, and the columns beside those of the format are not read."""
    rows = various_rows(60)
    for row in rows:
        row["when"] = datetime.datetime(2024, 1, 1)
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = {"name": "somebody/rows", "config": "calls", "revision": "abc"}
    result = prepared(tmp_path / "out", [source])
    assert asked == [(("somebody/rows", "calls"), {"revision": "abc", "split": "train"})]
    assert result.quality["rows"]["rejected"] == {}
    assert result.quality["sources"]["somebody/rows/calls"]["read"] == 60
