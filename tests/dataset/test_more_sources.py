"""xLAM, ToolACE and OpenAI messages: what is read, and why a row is not."""

import json
import keyword

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.contracts.conversation import Call
from tasks.dataset.sources import openai, toolace, xlam
from tasks.dataset.sources.rows import RowRejected
from tests.dataset.reading import read

WEATHER = {
    "name": "get_weather",
    "description": "d",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}


def openai_row(*turns: dict, tools: object = None) -> dict:
    return {"tools": [{"type": "function", "function": WEATHER}] if tools is None else tools, "messages": list(turns)}


def call_turn(arguments: object, name: str = "get_weather") -> dict:
    call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call, call]}


ASK = {"role": "user", "content": "Is it warm in Oslo?"}


@pytest.mark.parametrize("arguments", ['{"place": "Oslo"}', {"place": "Oslo"}])
def test_openai_calls_with_arguments_as_text_or_object(arguments):
    conversation = read(openai, openai_row({"role": "developer", "content": "s"}, ASK, call_turn(arguments)))
    assert conversation.reply.calls == (Call("get_weather", {"place": "Oslo"}),) * 2
    assert [m.role for m in conversation.messages] == ["system", "user"]


def test_openai_several_turns_parts_and_the_older_function_call():
    old = {"role": "assistant", "content": "", "function_call": {"name": "get_weather", "arguments": '{"place": "O"}'}}
    parts = {"role": "user", "content": [{"type": "text", "text": "Is it "}, {"type": "text", "text": "warm?"}]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": '{"celsius": 4}'}
    conversation = read(openai, openai_row(parts, old, result, {"role": "assistant", "content": "No."}))
    assert [m.role for m in conversation.messages] == ["user", "assistant", "tool"]
    assert conversation.messages[0].content == "Is it warm?"
    assert conversation.messages[1].calls == (Call("get_weather", {"place": "O"}),)
    assert conversation.reply.content == "No."


def xlam_row(parameters: dict, arguments: dict, **changes: object) -> dict:
    row = {
        "id": 0,
        "query": "Live giveaways?",
        "answers": json.dumps([{"name": "live giveaways", "arguments": arguments}]),
        "tools": json.dumps([{"name": "live giveaways", "description": "d", "parameters": parameters}]),
    }
    return row | changes


def test_xlam_flat_parameters_become_a_schema():
    parameters = {
        "type": {"description": "which", "type": "str, optional", "default": "game"},
        "ids": {"description": "of what", "type": "List[int]"},
        "limit": {"type": "int", "default": 5},
        "map": {"type": "Dict[str, int], optional"},
        "point": {"type": "Tuple[float, float]"},
    }
    conversation = read(xlam, xlam_row(parameters, {"ids": [1, 2], "point": [1.5, 2]}))
    schema = conversation.tools[0]["parameters"]
    assert schema["required"] == ["ids", "point"]
    assert schema["properties"]["type"] == {"type": "string", "description": "which", "default": "game"}
    assert schema["properties"]["ids"] == {"type": "array", "items": {"type": "integer"}, "description": "of what"}
    assert conversation.reply.calls == (Call("live giveaways", {"ids": [1, 2], "point": [1.5, 2]}),)


@pytest.mark.parametrize(
    ("python_type", "schema"),
    [
        ("str", {"type": "string"}),
        ("Optional[bool]", {"type": "boolean"}),
        ("List[List[float]]", {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}),
        ("Dict[str, int]", {"type": "object"}),
        ("Union[int, str]", {}),
        ("Tuple[float, float]", {"type": "array", "items": {}}),
        ("", {}),
    ],
)
def test_xlam_types(python_type, schema):
    assert xlam.schema_of(python_type) == schema


TRENDS = {
    "name": "Market Trends API",
    "description": "d",
    "parameters": {
        "type": "dict",
        "properties": {
            "trend_type": {"type": "string"},
            "limits": {"type": "list", "items": {"type": "float"}},
            "live": {"type": "bool"},
        },
        "required": ["trend_type"],
    },
    "required": None,
}


def toolace_row(answer: str) -> dict:
    return {
        "system": f"You are an expert [in composing].\nHere is a list:\n{json.dumps([TRENDS])}. \nShould you decide ...",
        "conversations": [{"from": "user", "value": "Which indexes lead?"}, {"from": "assistant", "value": answer}],
    }


def test_toolace_calls_with_spaces_brackets_and_quotes():
    first = 'Market Trends API(trend_type="A (b), [c]", limits=[1.5, 2], live=true)'
    answer = f"[{first}, Market Trends API(trend_type='it\\'s')]"
    assert read(toolace, toolace_row(answer)).reply.calls == (
        Call("Market Trends API", {"trend_type": "A (b), [c]", "limits": [1.5, 2], "live": True}),
        Call("Market Trends API", {"trend_type": "it's"}),
    )
    assert read(toolace, toolace_row(answer)).tools[0]["parameters"]["properties"]["limits"]["type"] == "array"


@pytest.mark.parametrize("words", ["The S&P 500 leads.", "[1] and (2) are sources [3]", "[see the list]"])
def test_toolace_words_are_no_calls(words):
    assert read(toolace, toolace_row(words)).reply.content == words


@pytest.mark.parametrize(
    ("source", "row", "reason"),
    [
        (openai, {}, "no_conversation"),
        (openai, openai_row(ASK, call_turn("{", "get_weather")), "bad_call"),
        (openai, openai_row(ASK, call_turn({"place": "O"}, "other")), "undeclared_tool"),
        (openai, openai_row(ASK, call_turn({"place": 3})), "schema_mismatch"),
        (openai, openai_row(ASK, {"role": "critic", "content": "x"}), "unknown_role"),
        (openai, openai_row(ASK, {"role": "assistant", "content": [{"type": "image_url"}]}), "bad_turn"),
        (openai, openai_row({"role": "assistant", "content": "Hello."}), "no_request"),
        (openai, openai_row(ASK, {"role": [], "content": "x"}), "unknown_role"),
        (openai, openai_row("hello"), "bad_turn"),
        (openai, openai_row(ASK, {"role": "assistant", "tool_calls": {"name": "x"}}), "bad_call"),
        (xlam, xlam_row({"n": {"type": "int"}}, {"n": "many"}), "schema_mismatch"),
        (xlam, xlam_row({"n": {"type": "int"}}, {}), "missing_argument"),
        (xlam, xlam_row({"n": {"type": "int"}}, {"m": 1}), "unknown_argument"),
        (xlam, xlam_row({}, {}, query=" "), "no_request"),
        (xlam, xlam_row({}, {}, answers="[]"), "no_answer"),
        (xlam, xlam_row({}, {}, answers="{"), "bad_call"),
        (xlam, xlam_row({}, {}, tools='["x"]'), "bad_tools"),
        (xlam, xlam_row({}, {}, tools=None), "bad_tools"),
        (toolace, toolace_row("[Market Trends API(trend_type=1)]"), "schema_mismatch"),
        (toolace, toolace_row("[Market Trends API()]"), "missing_argument"),
        (toolace, toolace_row("[Other API(trend_type='x')]"), "undeclared_tool"),
        (toolace, toolace_row("[Market Trends API('x')]"), "bad_call"),
        (toolace, toolace_row("[Market Trends API(trend_type=__import__('os').system('true'))]"), "bad_call"),
        (toolace, toolace_row("[Market Trends API(trend_type='x') Market Trends API(trend_type='y')]"), "bad_call"),
        (toolace, toolace_row("[Market Trends API(trend_type='x)]"), "bad_call"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(source, row, reason):
    with pytest.raises(RowRejected) as caught:
        read(source, row)
    assert caught.value.reason == reason


literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


names = st.one_of(st.from_regex(r"[a-z]{1,8}", fullmatch=True), st.sampled_from(keyword.kwlist))


@given(st.lists(st.dictionaries(names, literals, max_size=3), min_size=1, max_size=3))
def test_toolace_reads_back_whatever_python_writes(arguments):
    calls = [
        f"An API <{number}>(" + ", ".join(f"{name}={value!r}" for name, value in values.items()) + ")"
        for number, values in enumerate(arguments)
    ]
    read = toolace.read_calls(f"[{', '.join(calls)}]")
    assert [call.name for call in read] == [f"An API <{number}>" for number in range(len(calls))]
    assert [call.arguments for call in read] == arguments


columns = st.sampled_from(
    [
        "messages",
        "role",
        "content",
        "tool_calls",
        "query",
        "answers",
        "tools",
        "system",
        "value",
        "conversations",
        "from",
    ]
)
values = st.recursive(
    st.none() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(columns, inner),
    max_leaves=20,
)


@given(st.dictionaries(columns, values))
def test_no_row_does_worse_than_being_rejected(row):
    for source in (openai, xlam, toolace):
        with pytest.raises(RowRejected):
            read(source, row)
