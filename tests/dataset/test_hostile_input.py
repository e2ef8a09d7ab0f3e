"""Files and rows that are broken or meant to harm: no crash, no hang, nothing lost, nothing executed or fetched."""

import codecs
import json
import random
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.dataset.sources.files import MAX_ROW_BYTES, DatasetChanged, DatasetNotFound, parse, read_file
from tasks.dataset.sources.formats import FORMATS
from tasks.dataset.sources.literals import read_value
from tasks.dataset.sources.rows import RowRejected
from tests.dataset.reading import prepared, write_jsonl
from tests.dataset.test_prepare import as_format
from tests.dataset.test_split import various_rows, weather_row

GOOD = various_rows(60)


def outcome(raw):
    """The row, or why it cannot be one."""
    try:
        return parse(raw)
    except RowRejected as error:
        return error.reason


def prepared_lines(tmp_path, *lines: bytes):
    """Good rows and the lines, all of which must be accounted for; the reasons by position after the good rows."""
    path = tmp_path / "rows.jsonl"
    good = [json.dumps(row).encode() for row in GOOD]
    path.write_bytes(b"\n".join([*good, *lines]))
    result = prepared(tmp_path / "out", str(path))
    result.assert_all_accounted_for(len(good) + len(lines))
    return [line["reason"] for line in result.lines("rejected.jsonl")]


def test_lines_that_are_not_rows(tmp_path):
    truncated = json.dumps(GOOD[0]).encode()[:-20]
    assert prepared_lines(tmp_path, b'{"a": ', b"\xff\xfe", b"[1]", b"null", b'{"a": 1, "a": 2}', truncated) == [
        "not_json", "not_utf8", "not_a_row", "not_a_row", "not_json", "not_json",
    ]  # fmt: skip


def test_numbers_that_are_none_and_text_that_is_none(tmp_path):
    row = json.dumps(weather_row("Weather?", place="PLACE"))
    hostile = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, '"\\ud800"', "[" * 100_000]
    lines = [row.replace('"PLACE"', value).encode() for value in hostile]
    reasons = prepared_lines(tmp_path, *lines)
    assert reasons == ["not_json"] * 5 + ["not_utf8", "not_json"]


def test_a_huge_integer_that_is_one_is_kept_exactly(tmp_path):
    row = weather_row("How much?", place="x")
    row["tools"][0]["function"]["parameters"]["properties"]["place"] = {"type": "integer"}
    row["messages"][1]["tool_calls"][0]["function"]["arguments"]["place"] = 10**40
    path = write_jsonl(tmp_path / "rows.jsonl", [*GOOD, row])
    result = prepared(tmp_path / "out", path)
    assert 10**40 in [c.arguments["place"] for e in [*result.train, *result.test] for c in e.expected]


def test_a_row_of_50_megabytes_is_refused_without_being_held(tmp_path):
    big = b'{"messages": [{"role": "user", "content": "' + b"x" * 50_000_000 + b'"}]}'
    assert prepared_lines(tmp_path, big, b"{}") == ["row_too_large", "no_conversation"]
    array = tmp_path / "rows.json"
    array.write_bytes(b"[" + big + b",\n" + json.dumps(GOOD[0]).encode() + b"]")
    first, second = read_file(str(array))
    assert first.reason == "row_too_large"
    assert f"{MAX_ROW_BYTES / 1e6:.1f}" in first.detail
    assert parse(second) == GOOD[0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path, encoding):
    for suffix, text in ((".jsonl", "".join(json.dumps(r) + "\n" for r in GOOD)), (".json", json.dumps(GOOD))):
        path = tmp_path / f"rows{suffix}"
        path.write_bytes(codecs.encode(text, encoding))
        result = prepared(tmp_path / f"out{suffix}", str(path))
        assert result.quality["rows"]["rejected"] == {}


def test_a_list_with_a_row_in_another_encoding_loses_that_row_only(tmp_path):
    rows = [json.dumps(row).encode() for row in GOOD]
    rows[7] = rows[7].replace(b"Oslo", "Zürich".encode("latin-1"))
    (tmp_path / "rows.json").write_bytes(b"[" + b",".join(rows) + b"]")
    result = prepared(tmp_path / "out", str(tmp_path / "rows.json"))
    assert [line["reason"] for line in result.lines("rejected.jsonl")] == ["not_utf8"]
    result.assert_all_accounted_for(60)


@pytest.mark.parametrize(
    "cut", [b"", b"[", b'[{"a": 1}', b'[{"a": 1},', b'[{"a": 1} {"b": 2}]', b'[{"a": ', b"[nope]", b"[{}] {}"]
)
def test_a_list_that_is_cut_off_or_no_list_is_named(tmp_path, cut):
    path = tmp_path / "rows.json"
    path.write_bytes(cut)
    with pytest.raises(DatasetNotFound, match="rows.json"):
        list(read_file(str(path)))


def test_a_list_with_a_nan_goes_on_after_it(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"a": NaN}, {"a": 1, "a": 2}, 3, {"b": 1}]')
    assert [outcome(row) for row in read_file(str(path))] == [
        "not_json",
        "not_json",
        "not_a_row",
        {"b": 1},
    ]


def test_a_csv_with_ragged_rows_loses_those_only(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'query,answers\n"a, b",[]\nonly one\n1,2,3\n"x","\xff"\n')
    rows = list(read_file(str(path)))
    assert rows[0] == {"query": "a, b", "answers": []}
    assert [getattr(row, "reason", "row") for row in rows] == ["row", "not_csv", "not_csv", "row"]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    rows = read_file(str(path))
    next(rows)
    with path.open("a") as file:
        file.write('{"a": 3}\n')
    with pytest.raises(DatasetChanged, match="changed while it was read"):
        list(rows)


@pytest.mark.parametrize("tools", [None, "", "[]", [], {"name": "f"}, '{"name": "f"}'])
def test_tools_of_any_kind_that_mean_some_or_none(tmp_path, tools):
    assert prepared_lines(tmp_path, words_with(tools)) == []


@pytest.mark.parametrize("tools", [{}, "{}", 3, "nonsense", [[]], {"name": 3}, [{"name": "f"}, {"name": "f"}]])
def test_tools_that_are_none_are_bad_tools(tmp_path, tools):
    assert prepared_lines(tmp_path, words_with(tools)) == ["bad_tools"]


def words_with(tools) -> bytes:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    return json.dumps({"tools": tools, "messages": turns}).encode()


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "http://127.0.0.1:1/schema"},
        {"$ref": "#"},
        {"properties": {"place": {"$ref": "#/properties/place"}}},
        {"properties": {"place": {"type": "dict"}}},
        {"properties": {"place": {"type": "integer", "multipleOf": 0}}},
        {"properties": {"place": {"allOf": [{"allOf": [{"$ref": "#/properties/place"}]}]}}},
    ],
)
def test_schemas_that_refer_anywhere_or_nowhere(tmp_path, schema):
    row = weather_row("Weather?", place=1)
    row["tools"][0]["function"]["parameters"] = {"type": "object", "properties": {"place": {}}} | schema
    assert prepared_lines(tmp_path, json.dumps(row).encode()) == ["bad_tools"]


def test_a_dynamic_reference_reads_no_file(tmp_path):
    row = weather_row("Weather?")
    row["tools"][0]["function"]["parameters"]["properties"]["place"] = {"$dynamicRef": "file:///etc/passwd"}
    assert prepared_lines(tmp_path, json.dumps(row).encode()) == ["bad_tools"]


def test_a_pattern_that_would_take_years_is_never_run(tmp_path):
    row = weather_row("Weather?", place="a" * 60 + "!")
    row["tools"][0]["function"]["parameters"]["properties"]["place"] = {"type": "string", "pattern": "^(a+)+$"}
    assert prepared_lines(tmp_path, json.dumps(row).encode()) == []


@pytest.mark.parametrize("piece", ["<tool_call>", "\\n", "'", '"', ", ", "USER:\n", "[f(", "{'a':", "\n", "a=1,"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_long_run_of_anything_takes_no_time(name, piece):
    text = piece * (400_000 // len(piece))
    rows = [
        {"system": text, "chat": "USER: a\nASSISTANT: " + text, "conversations": [{"from": "user", "value": "a"}]},
        {
            "system": "",
            "chat": text,
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}],
        },
        {"query": "a", "answers": text, "tools": text},
        {"tools": "[]", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": text}]},
        {"tools": "[]", "conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": text}]},
        {"system": "", "conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": f"[{text})]"}]},
    ]
    began = time.monotonic()
    for row in rows:
        try:
            FORMATS[name](row, Counter())
        except RowRejected:
            continue
    # A quadratic reader takes minutes.
    assert time.monotonic() - began < 10


@given(st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_value_or_an_error_and_a_value_is_json(text):
    try:
        value = read_value(text, Counter())
    except ValueError:
        return
    assert json.loads(json.dumps(value, allow_nan=False)) == value


def test_ten_thousand_broken_rows_are_all_accounted_for(tmp_path):
    """Rows of every format with pieces cut, doubled, swapped and replaced."""
    draw = random.Random(4)
    tool = weather_row("x")["tools"][0]["function"]
    call = {"name": tool["name"], "arguments": {"place": "Oslo"}}
    originals = [json.dumps(as_format(name, f"Weather {i}?", tool, call)) for name in FORMATS for i in range(20)]
    junk = [
        "null",
        "[]",
        "{}",
        '""',
        "NaN",
        "\\",
        '"',
        "{",
        "]",
        "'",
        "\\ud800",
        "1e999",
        "true",
        "\x00",
        "<tool_call>",
    ]
    lines = []
    while len(lines) < 10_000:
        text = draw.choice(originals)
        for _ in range(draw.randint(0, 3)):
            start = draw.randrange(len(text))
            end = min(len(text), start + draw.randint(0, 30))
            match draw.randrange(4):
                case 0:
                    text = text[:start] + text[end:]
                case 1:
                    text = text[:end] + text[start:]
                case 2:
                    text = text[:start] + draw.choice(junk) + text[end:]
                case 3:
                    other = draw.choice(originals)
                    text = text[:start] + other[start:end] + text[end:]
        lines.append((text or "{").replace("\n", " "))
    for number, name in enumerate(("sharegpt", "openai", "toolace")):
        path = tmp_path / f"rows{number}.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
        result = prepared(tmp_path / f"out{number}", [{"name": str(path), "format": name}])
        result.assert_all_accounted_for(10_000)
        assert len(result.quality["rows"]["rejected"]) >= 5
