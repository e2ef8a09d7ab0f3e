"""How each family writes a conversation: exact text, and an answer that reads back as the same calls."""

import random
import string
from pathlib import Path

import pytest

from tasks.contracts.conversation import Call, Example, Message
from tasks.dataset.rendering.family import FAMILIES, detect_family, encode_conversation, encode_prompt, prompt_text
from tasks.dataset.rendering.json_calls import read_leniently

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TOOL = {
    "name": "get_weather",
    "description": "Current weather in a place",
    "parameters": {
        "type": "object",
        "properties": {
            "place": {"type": "string"},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            "days": {"type": "array", "items": {"type": "string", "format": "date"}},
            "where": {"type": "object", "properties": {"lat": {"type": "number", "description": "degrees"}}},
        },
        "required": ["place"],
    },
}
EXAMPLE = Example(
    id="golden",
    messages=(
        Message("system", "Be brief."),
        Message("user", "Weather in Oslo?"),
        Message("assistant", calls=(Call("get_weather", {"place": "Oslo"}),)),
        Message("tool", '{"degrees": 3}'),
        Message("assistant", "3 degrees."),
        Message("user", "And in Rome and Zürich?"),
    ),
    tools=(TOOL,),
    expected=(Call("get_weather", {"place": "Rome"}), Call("get_weather", {"place": "Zürich", "unit": "celsius"})),
    answer="",
    source="",
    slice="test",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_golden_text(name):
    family = FAMILIES[name]
    text = prompt_text(family, EXAMPLE) + family.answer(EXAMPLE.reply)
    assert text == (GOLDEN / f"conversation-{name}.txt").read_text()


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_reads_back_as_the_same_calls(name):
    family = FAMILIES[name]
    answer = family.answer(EXAMPLE.reply).removesuffix(family.end_of_turn)
    assert family.parse(answer).calls == EXAMPLE.expected
    assert read_leniently(answer).calls == EXAMPLE.expected
    assert family.parse("No tool fits.").calls == ()
    assert family.parse("No tool fits.").error is None


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
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
    ],
)
def test_a_strict_reading_forgives_nothing(text):
    reading = FAMILIES["smollm2"].parse(text)
    assert reading.error
    assert reading.calls == ()


def test_a_lenient_reading_forgives_tags_and_text():
    text = 'Sure! {"name": "f", "parameters": {"a": 1}} and [{"name": "g", "arguments": {}}]'
    assert read_leniently(text).calls == (Call("f", {"a": 1}), Call("g", {}))


def test_hostile_answers_neither_crash_nor_stall():
    rng = random.Random(1)
    pieces = ["<tool_call>", "</tool_call>", "{", "}", '"name"', ":", "[", '"', "\\", "\0", "é", "arguments", "1e999"]
    for _ in range(2000):
        text = "".join(rng.choice([*pieces, rng.choice(string.printable)]) for _ in range(rng.randint(0, 60)))
        for family in FAMILIES.values():
            reading = family.parse(text)
            assert not (reading.calls and reading.error)
        assert read_leniently(text).error is None
    for text in ("{" * 1_000_000, '{"name":' * 100_000, "<tool_call>" * 100_000):
        assert FAMILIES["smollm2"].parse(text).calls == ()
        assert read_leniently(text).calls == ()


def test_a_model_of_no_known_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="set model.family"):
        detect_family(tmp_path)


@pytest.fixture(scope="module")
def tokenizer(embedded_model):
    from tasks.models.load import load_tokenizer

    assert detect_family(embedded_model) == "smollm2"
    return load_tokenizer(embedded_model)


@pytest.mark.integration
class TestWithTheRealTokenizer:
    def test_the_loss_counts_the_answers_and_nothing_else(self, tokenizer):
        ids, is_answer = encode_conversation(tokenizer, FAMILIES["smollm2"], EXAMPLE)
        stretches, previous = [], False
        for token, counted in zip(ids, is_answer, strict=True):
            if counted and not previous:
                stretches.append("")
            if counted:
                stretches[-1] += tokenizer.decode([token])
            previous = counted
        print("\n".join(f"{tokenizer.decode([t])!r:>20} {'loss' if c else ''}" for t, c in zip(ids, is_answer)))
        assert stretches == [
            '<tool_call>{"name": "get_weather", "arguments": {"place": "Oslo"}}</tool_call><|im_end|>',
            "3 degrees.<|im_end|>",
            '<tool_call>{"name": "get_weather", "arguments": {"place": "Rome"}}</tool_call>\n'
            '<tool_call>{"name": "get_weather", "arguments": {"place": "Zürich", "unit": "celsius"}}'
            "</tool_call><|im_end|>",
        ]

    def test_inference_asks_with_the_very_ids_that_training_taught(self, tokenizer):
        taught, is_answer = encode_conversation(tokenizer, FAMILIES["smollm2"], EXAMPLE)
        asked = encode_prompt(tokenizer, FAMILIES["smollm2"], EXAMPLE)
        assert taught[: len(asked)] == asked
        assert all(is_answer[len(asked) :])

    def test_the_end_of_turn_is_one_token(self, tokenizer):
        assert len(tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"]) == 1
