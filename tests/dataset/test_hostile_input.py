"""Files and rows that are broken or meant to harm: no crash, no hang, nothing lost, nothing executed or fetched."""

import codecs
import csv
import hashlib
import json
import random
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
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


def quarantined(tmp_path, *lines: bytes):
    """What the quarantine file says after good rows and the lines, all of which must be accounted for."""
    path = tmp_path / "rows.jsonl"
    good = [json.dumps(row).encode() for row in GOOD]
    path.write_bytes(b"\n".join([*good, *lines]))
    result = prepared(tmp_path / "out", str(path))
    result.assert_all_accounted_for(len(good) + len(lines))
    return result.lines("rejected.jsonl")


def prepared_lines(tmp_path, *lines: bytes):
    """The reasons of those lines that are rejected."""
    return [line["reason"] for line in quarantined(tmp_path, *lines)]


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


def at(place):
    """The bytes that a quarantined row's place names."""
    with Path(place["file"]).open("rb") as file:
        file.seek(place["byte_offset"])
        found = file.read(place["num_bytes"])
    assert hashlib.sha256(found).hexdigest() == place["sha256"]
    return found


def test_a_row_of_50_megabytes_is_refused_without_being_held_and_its_place_is_named(tmp_path):
    big = '{"messages": [{"role": "user", "content": "é'.encode() + b"x" * 50_000_000 + b'"}]}'
    first, second = quarantined(tmp_path, big, b"{}")
    assert (first["reason"], second["reason"]) == ("row_too_large", "no_conversation")
    assert (first["row"], second["row"], second["place"]) == (None, "{}", None)
    assert at(first["place"] | {"file": tmp_path / "rows.jsonl"}) == big + b"\n"
    array = tmp_path / "rows.json"
    other = json.dumps(GOOD[0] | {"é": "\u00fc"}, ensure_ascii=False).encode()
    array.write_bytes(codecs.BOM_UTF8 + b"[" + b",\n".join([*[other] * 5000, big, other]) + b"]")
    *before, first, last = read_file(str(array))
    assert first.reason == "row_too_large"
    assert f"{MAX_ROW_BYTES / 1e6:.1f}" in first.detail
    assert at(first.place | {"file": str(array)}) == big
    assert [*map(bytes, before), last] == [other] * 5001


def test_a_rejected_row_is_kept_whole(tmp_path):
    long_row = {"messages": [{"role": "alien", "content": "x" * 3_000_000}, {"role": "user", "content": "end"}]}
    latin = json.dumps(weather_row("x")).replace('"x"', '"Z\xfcrich"').encode("latin-1")
    lines = [json.dumps(long_row).encode(), json.dumps(weather_row("y")).encode()[:-20], latin]
    rejected = quarantined(tmp_path, *lines)
    assert [line["reason"] for line in rejected] == ["unknown_role", "not_json", "not_utf8"]
    assert json.loads(rejected[0]["row"]) == long_row
    assert rejected[1]["row"].encode() == lines[1]
    assert "Z\\xfcrich" in rejected[2]["row"]


def test_parquet_rows_that_json_has_not_are_kept_or_placed(tmp_path):
    tools = [None, float("nan"), None]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"messages": [row["messages"] for row in GOOD[:3]], "tools": tools}), path)
    _, nan, _ = read_file(str(path))
    assert nan.reason == "not_json"
    assert GOOD[1]["messages"][0]["content"] in nan.row
    # A column of text that is none: only its place can be told.
    text = pa.StringArray.from_buffers(3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb"))
    pq.write_table(pa.table({"query": text, "answers": ["[]"] * 3}), path)
    _, bad, _ = read_file(str(path))
    assert (bad.reason, bad.row) == ("not_utf8", None)
    assert bad.place["row"] == 1
    assert bad.place["file"].endswith("rows.parquet")


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
    assert [(row.row, row.detail) for row in rows[1:3]] == [
        ("only one", "line 3: 1 cells, and the header has 2"),
        ("1,2,3", "line 4: 3 cells, and the header has 2"),
    ]


def test_a_quote_that_is_never_closed_takes_lines_with_it_and_each_is_kept(tmp_path):
    rows = [{"messages": json.dumps(row["messages"]), "tools": json.dumps(row["tools"])} for row in GOOD]
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["messages", "tools"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        good_lines = len(rows) + 1
        file.write('a,"never closed\nb,c\nd,e\n')
    result = prepared(tmp_path / "out", str(path))
    # The three lines are one record, so they count once.
    result.assert_all_accounted_for(len(rows) + 1)
    (line,) = result.lines("rejected.jsonl")
    assert line["reason"] == "not_csv"
    assert line["row"] == 'a,"never closed\nb,c\nd,e'
    assert f"lines {good_lines + 1} to {good_lines + 3} are one record" in line["detail"]
    assert "none of these 3 lines is used" in line["detail"]
    path.write_text('query,answers\n1,[]\nx,"open\ny,z\nu,"v"\n2,[]\n')
    first, broken, last = read_file(str(path))
    assert (first["query"], last["query"]) == ("1", "2")
    assert broken.row == 'x,"open\ny,z\nu,"v"'
    path.write_text('query,answers\nx,"' + "open\n" * (MAX_ROW_BYTES // 5 + 1) + "1,[]\n")
    broken, *rest = read_file(str(path))
    assert broken.row is None
    assert broken.place["first_line"] == 2
    assert broken.place["last_line"] - 1 + len(rest) == MAX_ROW_BYTES // 5 + 2


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
    # Of this process: other work on the machine is not the reader's.
    began = time.process_time()
    for row in rows:
        try:
            FORMATS[name](row, Counter())
        except RowRejected:
            continue
    # A quadratic reader takes minutes.
    assert time.process_time() - began < 10


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
