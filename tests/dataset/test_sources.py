"""Source formats: what is read, and why a row is not."""

import json
from collections import Counter

import pytest

from tasks.contracts.conversation import Call
from tasks.dataset.sources import glaive, hermes, sharegpt
from tasks.dataset.sources.rows import RowRejected
from tests.dataset.reading import read

TOOL = {
    "type": "function",
    "function": {
        "name": "set_temperature",
        "description": "d",
        "parameters": {"type": "object", "properties": {"degrees": {"type": "integer"}}, "required": ["degrees"]},
    },
}


def hermes_row(answer: str, tools: object = None) -> dict:
    return {
        "tools": json.dumps([TOOL]) if tools is None else tools,
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "Make it 21 degrees."},
            {"from": "gpt", "value": answer},
        ],
    }


def test_hermes_json_call():
    row = hermes_row('<tool_call>\n{"name": "set_temperature", "arguments": {"degrees": 21}}\n</tool_call>')
    assert read(hermes, row).reply.calls == (Call("set_temperature", {"degrees": 21}),)


def test_hermes_call_as_python_literal_is_read_and_never_evaluated():
    row = hermes_row("<tool_call>\n{'name': 'set_temperature', 'arguments': {'degrees': 21}}\n</tool_call>")
    assert read(hermes, row).reply.calls == (Call("set_temperature", {"degrees": 21}),)
    with pytest.raises(RowRejected, match="bad_call"):
        read(hermes, hermes_row("<tool_call>__import__('os').system('true')</tool_call>"))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ('<tool_call>{"name": "other", "arguments": {}}</tool_call>', "undeclared_tool"),
        ('<tool_call>{"name": "set_temperature", "arguments": {"degrees": "x"}}</tool_call>', "schema_mismatch"),
        ('<tool_call>{"name": "set_temperature", "arguments": {}}</tool_call>', "missing_argument"),
        ('<tool_call>{"name": "set_temperature", "arguments": {"degrees": 1, "x": 2}}</tool_call>', "unknown_argument"),
        ('<tool_call>{"name": "set_temperature"', "bad_call"),
        ("", "empty_answer"),
    ],
)
def test_hermes_row_that_cannot_be_used_says_why(answer, reason):
    with pytest.raises(RowRejected) as caught:
        read(hermes, hermes_row(answer))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "tools",
    [
        [{"name": "f", "parameters": {"type": "object", "properties": {}, "$ref": "http://127.0.0.1:1/x"}}],
        [{"name": "f", "parameters": {"$ref": "#"}}],
        [{"name": "f", "parameters": {"type": 12}}],
    ],
)
def test_a_hostile_schema_is_rejected_and_no_reference_is_fetched(tools):
    with pytest.raises(RowRejected, match="bad_tools"):
        read(hermes, hermes_row('<tool_call>{"name": "f", "arguments": {}}</tool_call>', tools))


def test_glaive_arguments_in_single_quotes():
    row = {
        "system": 'SYSTEM: Use them if required -\n{"name": "rate", "description": "", "parameters": {"type": "object",'
        ' "properties": {"from": {"type": "string"}}, "required": ["from"]}}\n',
        "chat": "USER: Rate of USD?\n\n\nASSISTANT: <functioncall> "
        '{"name": "rate", "arguments": \'{"from": "USD"}\'} <|endoftext|>\n\n\nFUNCTION RESPONSE: {"r": 1}\n\n\n'
        "ASSISTANT: It is 1. <|endoftext|>",
    }
    conversation = read(glaive, row)
    assert [m.role for m in conversation.messages] == ["user", "assistant", "tool"]
    assert conversation.messages[1].calls == (Call("rate", {"from": "USD"}),)
    assert conversation.reply.content == "It is 1."


def test_every_real_row_is_read_or_has_a_reason(glaive_rows):
    outcomes = Counter()
    for row in glaive_rows:
        try:
            outcomes["read"] += bool(read(sharegpt, row).reply)
        except RowRejected as error:
            outcomes[error.reason] += 1
    assert sum(outcomes.values()) == 300
    assert outcomes["read"] >= 270, outcomes
