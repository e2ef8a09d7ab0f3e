"""Answers read back: the same calls, nothing forgiven, and no time lost on hostile ones."""

import random
import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.contracts.conversation import Call, Message, calls_to_json
from tasks.dataset.rendering.family import FAMILIES
from tasks.dataset.rendering.json_calls import read_leniently
from tests.dataset.test_rendering import EVERY_FAMILY, EXAMPLE


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_an_answer_reads_back_as_the_same_calls(name):
    family = EVERY_FAMILY[name]
    answer = family.answer(EXAMPLE.reply).removesuffix(family.end_of_turn)
    assert family.parse(answer).calls == EXAMPLE.expected
    assert read_leniently(answer).calls == EXAMPLE.expected
    assert family.parse("No tool fits.").calls == ()
    assert family.parse("No tool fits.").error is None


MARKS = [
    "</tool_call>",
    "<tool_call>",
    "[TOOL_CALLS] [{",
    "}\n{",
    "\u2028",
    "\x85",
    '"',
    "\\",
    "'",
    "### User\n",
    "</think>",
]
texts = st.text(max_size=8) | st.sampled_from(MARKS)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("name", EVERY_FAMILY)
@given(st.lists(st.builds(Call, texts, st.dictionaries(texts, values, max_size=3)), min_size=1, max_size=3))
def test_any_calls_read_back_as_they_were(name, calls):
    family = EVERY_FAMILY[name]
    answer = family.answer(Message("assistant", calls=tuple(calls))).removesuffix(family.end_of_turn)
    reading = family.parse(answer)
    assert reading.error is None
    assert calls_to_json(reading.calls) == calls_to_json(calls)


def test_calls_of_mistral_are_read_without_their_mark_and_without_ids():
    # Inference drops control tokens, and the untrained model writes no ids.
    call = Call("f", {"a": 1})
    for text in (
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "call00001"}]',
        '[{"name": "f", "arguments": {"a": 1}, "id": "call00001"}]',
        ' [{"name": "f", "arguments": {"a": 1}}]',
    ):
        assert FAMILIES["mistral"].parse(text).calls == (call,)
    assert FAMILIES["mistral"].parse("[None] of them fits.").error is None


@pytest.mark.parametrize(
    "text",
    [
        '[TOOL_CALLS] {"name": "f", "arguments": {}}',
        "[TOOL_CALLS] []",
        "[TOOL_CALLS] f()",
        'Sure: [TOOL_CALLS] [{"name": "f", "arguments": {}}]',
        '[{"name": "f", "arguments": {}}] Done.',
        '[{"name": "f", "arguments": {}, "id": 1}]',
        '[{"name": "f", "parameters": {}}]',
        '[{"name": "f", "arguments": {"a": 1, "a": 2}}]',
        "[{" * 100_000,
    ],
)
def test_a_strict_reading_of_mistral_forgives_nothing(text):
    reading = FAMILIES["mistral"].parse(text)
    assert reading.error
    assert reading.calls == ()


@pytest.mark.parametrize("name", ["llama3", "generic"])
@pytest.mark.parametrize("text", ['{"name": "f"}', '{"name": "f", "arguments": {}, "parameters": {}}', "{} and so on"])
def test_a_strict_reading_of_lines_forgives_nothing(name, text):
    reading = EVERY_FAMILY[name].parse(text)
    assert reading.error
    assert reading.calls == ()


@pytest.mark.parametrize("name", ["smollm2", "qwen2", "qwen2_5", "qwen3"])
@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{not json}</tool_call>",
        '<tool_call>{"name": "f", "arguments": {}}',
        'Sure: <tool_call>{"name": "f", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {}, "x": 1}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": 1, "a": 2}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {}}</tool_call> Done.',
        '<tool_call>{"name": "f", "arguments": {}} and so on</tool_call>',
        '<think>Well</think><tool_call>{"name": "f", "arguments": {}}</tool_call>',
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
    ],
)
def test_a_strict_reading_forgives_nothing(name, text):
    reading = FAMILIES[name].parse(text)
    assert reading.error
    assert reading.calls == ()


def test_a_lenient_reading_forgives_tags_and_text():
    text = 'Sure! {"name": "f", "parameters": {"a": 1}} and [{"name": "g", "arguments": {}}]'
    assert read_leniently(text).calls == (Call("f", {"a": 1}), Call("g", {}))


def test_hostile_answers_neither_crash_nor_stall():
    rng = random.Random(1)
    pieces = [
        "[TOOL_CALLS]",
        "[{",
        "<tool_call>",
        "</tool_call>",
        "{",
        "}",
        '"name"',
        ":",
        "[",
        '"',
        "\\",
        "\0",
        "é",
        "arguments",
        "1e999",
    ]
    for _ in range(2000):
        text = "".join(rng.choice([*pieces, rng.choice(string.printable)]) for _ in range(rng.randint(0, 60)))
        for family in EVERY_FAMILY.values():
            reading = family.parse(text)
            assert not (reading.calls and reading.error)
        assert read_leniently(text).error is None
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    hostile = (
        "{" * 1_000_000,
        '{"name":' * 100_000,
        "<tool_call>" * 100_000,
        "[{" * 500_000,
        call * 20_000 + "<tool_call>",
    )
    for text in hostile:
        began = time.process_time()
        for family in EVERY_FAMILY.values():
            assert family.parse(text).calls == ()
        assert time.process_time() - began < 10
        assert len(read_leniently(text).calls) <= 200
