"""Whatever a model writes is read, kept in Parquet, and scored: nothing crashes, stalls, or is dropped."""

import json
import random
import time
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from tasks.contracts.comparison import Outcome
from tasks.contracts.conversation import Call, Example, Message
from tasks.contracts.prediction import Prediction, prediction_from_record
from tasks.dataset.rendering.json_calls import MAX_DEPTH, read_leniently
from tasks.evaluation.scoring import score
from tasks.inference.run import write_predictions
from tests.dataset.test_rendering import EVERY_FAMILY

NUM_FUZZED = 10_000
TOOLS = tuple(
    {"name": name, "description": "", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    for name in ("f", "g")
)
EXAMPLE = Example("id", (Message("user", "q"),), TOOLS, (Call("f", {"a": 1}), Call("f", {"a": 2})), "", "s", "test")
CALL = '{"name": "f", "arguments": {"a": 1}}'
PIECES = (
    CALL, "<tool_call>", "</tool_call>", "<tool_call>" + CALL + "</tool_call>", "\n", "{", "}", "[", "]", "(", ")", '"',
    "'", "\\", ",", ":", '"name"', '"arguments"', "f(a=1)", "[f(a=1), f(a=2)]", "```json\n", "```", "[TOOL_CALLS] ",
    "<think>", "__import__('os').system('false')", "lambda: 0", "-" * 50, "1e999", "NaN", "9" * 5000, "\\ud800", "\0",
    "\u2028", "é", "\x00\x1b[2J", "<|im_end|>", "True", "null", "f(**{})", "f(a=f(a=1))", "[[[[",
)  # fmt: skip


def fuzzed_call(rng: random.Random) -> str:
    name = rng.choice(["f", "f", "f", "g", "h"])
    value = rng.choice(["1", "2", '"1"', "true", "null", "[1]", "3", '{"a": 1}'])
    key = rng.choice(["a", "a", "a", "b", ""])
    arguments = f'{{"{key}": {value}}}' if key else "{}"
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


def answer(text: str, family) -> Prediction:
    return Prediction("id", text, family.parse(text), read_leniently(text), 1, 1, False, 1.0)


def test_ten_thousand_fuzzed_answers_are_read_kept_and_scored(tmp_path):
    rng = random.Random(11)
    families = [EVERY_FAMILY[name] for name in ("smollm2", "qwen3", *EVERY_FAMILY)]
    predictions = []
    for number in range(NUM_FUZZED):
        # Noise alone reads as nothing: every other answer is calls, most with an argument gone wrong, and little noise.
        noise = "".join(rng.choices(PIECES, k=rng.randint(0, 25) if number % 2 else int(rng.random() * 1.3)))
        text = noise if number % 2 else noise + "".join(fuzzed_call(rng) for _ in range(rng.randint(1, 3)))
        predictions.append(replace(answer(text, families[number % len(families)]), example_id=str(number)))
    write_predictions(predictions, tmp_path / "p.parquet")
    kept = [prediction_from_record(r) for r in pq.read_table(tmp_path / "p.parquet").to_pylist()]
    scores = [score(EXAMPLE, prediction) for prediction in kept]
    assert len(scores) == NUM_FUZZED
    assert all(s.outcome in (Outcome.CORRECT, Outcome.WRONG) and s.reason for s in scores)
    assert all((s.fault is None) == (s.outcome is Outcome.CORRECT) for s in scores)
    # The fuzzing reaches every part: calls that are read, and most kinds of faults.
    assert len({s.fault for s in scores}) > 6


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return (
        "<tool_call>" + '{"name": "f", "arguments": {"a": ' + opening * depth + "1" + closing * depth + "}}</tool_call>"
    )


@pytest.mark.parametrize(
    "text",
    [
        nested(300),
        nested(900),
        nested(100_000),
        nested(400, '{"a": ', "}"),
        f'<tool_call>{{"name": "f", "arguments": {{"a": "{"x" * 1_000_000}"}}}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": "f", "\\ud800": 1, "arguments": {}}</tool_call>',
        "half a character \ud800 in the words themselves",
        f"<tool_call>{CALL}</tool_call>" * 20_000,
        f"{CALL}\n" * 20_000,
        "<tool_call>" * 90_000,
        "[f(a=" + "-" * 19_000 + "1)]",
        "[f(a=" + "(" * 9_000 + "1" + ")" * 9_000 + ")]",
        "[f(a=" + "[" * 9_000 + "]" * 9_000 + ")]",
        "[" + "f(a=1)," * 2_800 + "f(a=1)]",
        "f(a='" + "\\" * 19_000 + "')",
        "[f(a=open('/etc/passwd').read())]",
        "{" * 1_000_000,
    ],
    ids=range(18),
)
def test_a_hostile_answer_costs_seconds_at_most_and_is_wrong(text, tmp_path):
    began = time.process_time()
    for family in EVERY_FAMILY.values():
        prediction = answer(text, family)
        write_predictions([prediction], tmp_path / "p.parquet")
        (record,) = pq.read_table(tmp_path / "p.parquet").to_pylist()
        assert score(EXAMPLE, prediction_from_record(record)).outcome is Outcome.WRONG
    assert time.process_time() - began < 20


def test_a_call_nested_as_deep_as_allowed_is_read_and_one_level_more_is_not():
    family = EVERY_FAMILY["qwen2_5"]
    assert family.parse(nested(MAX_DEPTH - 1)).calls
    reading = family.parse(nested(MAX_DEPTH))
    assert "nested deeper" in (reading.error or "")
    assert read_leniently(nested(MAX_DEPTH)).calls == ()


def test_python_style_and_fenced_calls_are_read_leniently_and_never_run():
    expected = (Call("f", {"a": 1}), Call("g.h", {"b": "x", "c": [True, None]}))
    python = '[f(a=1), g.h(b="x", c=[True, None])]'
    for text in (python, f"```python\n{python}\n```", f"<tool_call>{python}</tool_call>"):
        assert read_leniently(text).calls == expected
    assert read_leniently("f(a=1)").calls == expected[:1]
    for text in ("f(a=__import__('os').getpid())", "f(1)", "I call f(a=1) now.", "see (this)", "[1] a (b)"):
        assert read_leniently(text).calls == ()
    assert (
        read_leniently("```json\n" + json.dumps([{"name": "f", "arguments": {"a": 1}}]) + "\n```").calls == expected[:1]
    )
