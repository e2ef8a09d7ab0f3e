"""How each family writes a conversation: exact text, and what of it the loss counts."""

import dataclasses
from pathlib import Path

import pytest

from tasks.contracts.conversation import Call, Example, Message
from tasks.dataset.rendering.family import (
    FAMILIES,
    detect_family,
    encode_conversation,
    encode_prompt,
    family_for,
    prompt_text,
)
from tasks.dataset.rendering.generic import Generic

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
EVERY_FAMILY = {**FAMILIES, "generic": Generic(begin="<s>", end_of_turn="</s>")}


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_golden_text(name):
    family = EVERY_FAMILY[name]
    text = prompt_text(family, EXAMPLE) + family.answer(EXAMPLE.reply)
    assert text == (GOLDEN / f"conversation-{name}.txt").read_text()


QWEN_ANSWERS = [
    '<tool_call>\n{"name": "get_weather", "arguments": {"place": "Oslo"}}\n</tool_call><|im_end|>',
    "3 degrees.<|im_end|>",
    '<tool_call>\n{"name": "get_weather", "arguments": {"place": "Rome"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_weather", "arguments": {"place": "Zürich", "unit": "celsius"}}\n</tool_call><|im_end|>',
]
ANSWERS = {
    "smollm2": [
        '<tool_call>{"name": "get_weather", "arguments": {"place": "Oslo"}}</tool_call><|im_end|>',
        "3 degrees.<|im_end|>",
        '<tool_call>{"name": "get_weather", "arguments": {"place": "Rome"}}</tool_call>\n'
        '<tool_call>{"name": "get_weather", "arguments": {"place": "Zürich", "unit": "celsius"}}</tool_call><|im_end|>',
    ],
    "llama3": [
        '{"name": "get_weather", "parameters": {"place": "Oslo"}}<|eot_id|>',
        "3 degrees.<|eot_id|>",
        '{"name": "get_weather", "parameters": {"place": "Rome"}}\n'
        '{"name": "get_weather", "parameters": {"place": "Zürich", "unit": "celsius"}}<|eot_id|>',
    ],
    "qwen2": QWEN_ANSWERS,
    "qwen2_5": QWEN_ANSWERS,
    "qwen3": QWEN_ANSWERS,
    "mistral": [
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"place": "Oslo"}, "id": "call00001"}]</s>',
        " 3 degrees.</s>",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"place": "Rome"}, "id": "call00001"}, '
        '{"name": "get_weather", "arguments": {"place": "Zürich", "unit": "celsius"}, "id": "call00002"}]</s>',
    ],
    "generic": [
        '{"name": "get_weather", "arguments": {"place": "Oslo"}}</s>',
        "3 degrees.</s>",
        '{"name": "get_weather", "arguments": {"place": "Rome"}}\n'
        '{"name": "get_weather", "arguments": {"place": "Zürich", "unit": "celsius"}}</s>',
    ],
}


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_the_loss_counts_each_answer_with_its_end_of_turn_and_nothing_else(name):
    family = EVERY_FAMILY[name]
    segments = family.segments(EXAMPLE.messages, EXAMPLE.tools)
    counted = [segment.text for segment in segments if segment.is_answer]
    assert [*counted, family.answer(EXAMPLE.reply)] == ANSWERS[name]


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_an_earlier_answer_is_taught_behind_what_inference_would_have_asked(name):
    family = EVERY_FAMILY[name]
    segments = family.segments(EXAMPLE.messages, EXAMPLE.tools)
    for position, message in enumerate(EXAMPLE.messages):
        if message.role == "assistant":
            asked = family.segments(EXAMPLE.messages[:position], EXAMPLE.tools)
            assert segments[: len(asked)] == asked


PARALLEL = (
    Message("user", "Rome? Oslo?"),
    Message("assistant", calls=(Call("get_weather", {"place": "Rome"}), Call("get_weather", {"place": "Oslo"}))),
    Message("tool", "18"),
    Message("tool", "three degrees"),
)


@pytest.mark.parametrize(
    ("name", "results"),
    [
        ("smollm2", "<|im_start|>tool\n18<|im_end|>\n<|im_start|>tool\nthree degrees<|im_end|>\n"),
        ("llama3", "<|start_header_id|>ipython<|end_header_id|>\n\nthree degrees<|eot_id|>"),
        (
            "qwen2_5",
            "<|im_start|>user\n<tool_response>\n18\n</tool_response>\n"
            "<tool_response>\nthree degrees\n</tool_response><|im_end|>\n",
        ),
        (
            "mistral",
            '</s>[TOOL_RESULTS] {"content": 18, "call_id": "call00001"}[/TOOL_RESULTS]'
            '[TOOL_RESULTS] {"content": "three degrees", "call_id": "call00002"}[/TOOL_RESULTS]',
        ),
        ("generic", "### Result\n18\n\n### Result\nthree degrees\n\n"),
    ],
)
def test_the_results_of_parallel_calls_follow_in_order(name, results):
    segments = EVERY_FAMILY[name].segments(PARALLEL, (TOOL,))
    assert results in "".join(segment.text for segment in segments)


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("smollm2", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        (
            "qwen2",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "qwen2_5",
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("qwen3", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        ("mistral", "<s>[INST] Hi[/INST]"),
        ("generic", "<s>### User\nHi\n\n### Assistant\n"),
    ],
)
def test_a_request_without_tools_and_system_message(name, prompt):
    example = dataclasses.replace(EXAMPLE, messages=(Message("user", "Hi"),), tools=())
    assert prompt_text(EVERY_FAMILY[name], example) == prompt


@dataclasses.dataclass
class TinyTokenizer:
    bos_token: str | None
    eos_token: str | None
    writes_bos: bool
    bos_token_id = 1

    def __call__(self, text):
        return {"input_ids": [self.bos_token_id, 7] if self.writes_bos else [7]}


class TestGeneric:
    @pytest.mark.parametrize(
        ("bos", "writes_bos", "begin"), [("<s>", True, "<s>"), ("<|endoftext|>", False, ""), (None, False, "")]
    )
    def test_it_begins_and_ends_as_the_tokenizer_does(self, bos, writes_bos, begin):
        family = family_for("generic", TinyTokenizer(bos, "<end>", writes_bos))
        assert prompt_text(family, EXAMPLE).startswith(f"{begin}### System\n")
        assert family.end_of_turn == "<end>"
        assert family.answer(EXAMPLE.reply).endswith("<end>")

    def test_a_tokenizer_without_an_end_is_refused(self):
        with pytest.raises(ValueError, match="end-of-text token"):
            family_for("generic", TinyTokenizer("<s>", None, True))

    def test_other_families_need_nothing_of_the_tokenizer(self):
        assert family_for("qwen3", None) is FAMILIES["qwen3"]


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
        assert stretches == ANSWERS["smollm2"]

    def test_inference_asks_with_the_very_ids_that_training_taught(self, tokenizer):
        taught, is_answer = encode_conversation(tokenizer, FAMILIES["smollm2"], EXAMPLE)
        asked = encode_prompt(tokenizer, FAMILIES["smollm2"], EXAMPLE)
        assert taught[: len(asked)] == asked
        assert all(is_answer[len(asked) :])

    def test_the_end_of_turn_is_one_token(self, tokenizer):
        assert len(tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"]) == 1

    def test_generic_ends_with_the_end_of_the_tokenizer(self, tokenizer):
        family = family_for("generic", tokenizer)
        ids, is_answer = encode_conversation(tokenizer, family, EXAMPLE)
        assert ids[-1] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(family.end_of_turn)
        assert is_answer[-1]
        assert prompt_text(family, EXAMPLE).startswith("### System")
