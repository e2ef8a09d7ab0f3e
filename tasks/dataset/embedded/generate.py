"""The embedded dataset: function-calling conversations written from a seed, in Hermes' row format.

A row, shortened::

    {"id": "embedded-7-train-000012", "category": "weather", "subcategory": "several_tools", "task": "get_forecast",
     "tools": "[{\\"type\\": \\"function\\", \\"function\\": {\\"name\\": \\"get_forecast\\", ...}}, ...]",
     "conversations": [
        {"from": "system", "value": "You are a function calling AI model. ... <tools> ... </tools> ..."},
        {"from": "human", "value": "Forecast for Oslo, 3 days ahead. Thanks!"},
        {"from": "gpt", "value": "<tool_call>\\n{\\"name\\": \\"get_forecast\\", \\"arguments\\": ...}\\n</tool_call>"}]}

Test requests use phrasings, places, people and things that training never sees, and the rows of ``unseen_tools``
use tools that training is never even offered. Row *i* of a split depends on the seed and *i* alone, so asking for
more rows leaves the earlier ones as they are.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tasks.dataset.embedded.catalog import Tool, catalog
from tasks.dataset.embedded.slots import SLOTS, Split

Row = dict[str, Any]

CATEGORIES = ("one_call", "several_tools", "parallel_calls", "no_fitting_tool")
CATEGORY_PATTERN: dict[Split, Sequence[str]] = {
    "train": (
        "several_tools", "several_tools", "parallel_calls", "no_fitting_tool", "several_tools",
        "one_call", "several_tools", "parallel_calls", "no_fitting_tool", "several_tools",
    ),
    "test": (
        "one_call", "several_tools", "no_fitting_tool", "one_call", "several_tools",
        "one_call", "parallel_calls", "several_tools", "one_call", "no_fitting_tool",
    ),
}  # fmt: skip
"""Repeats every ten rows, so that any number of rows has the same mix; training has more of what is hard to learn."""

SYSTEM = (
    "You are a function calling AI model. You are provided with function signatures within <tools></tools> XML tags. "
    "You may call one or more functions to assist with the user query.\n<tools>\n{tools}\n</tools>\nFor each function "
    "call return a json object with function name and arguments within <tool_call></tool_call> XML tags."
)
OPENINGS: dict[Split, Sequence[str]] = {
    "train": ("", "", "", "", "Hi! ", "Hello. ", "Quick question. ", "Please help. ", "Good morning. ", "One thing: "),
    "test": ("", "", "", "", "Hey there. ", "Excuse me. ", "Short on time here. ", "Good evening. "),
}
CLOSINGS: dict[Split, Sequence[str]] = {
    "train": ("", "", "", "", " Thanks!", " Thank you.", " Please.", " It's urgent.", " Take your time."),
    "test": ("", "", "", "", " Cheers.", " Much appreciated.", " Sorry for the trouble.", " That would help a lot."),
}
CONNECTORS: dict[Split, Sequence[str]] = {
    "train": (" Also, ", " And then: ", " After that: ", " Second thing: ", " Plus: "),
    "test": (" Besides that: ", " One more: ", " Next: ", " In addition: "),
}
OFF_TOPIC: dict[Split, Sequence[str]] = {
    "train": (
        "Write a short poem about {exhibit}.", "Why do people like {exhibit}?", "Tell me a joke about {exhibit}.",
        "What is the meaning of {topic}?", "Who was the first to study {subject}?", "Explain {subject} to a child.",
        "What is {count} times {count}?", "Name three famous people from {place}.", "Do you like {product} or not?",
        "Give me a good name for a cat called after {person}.", "How many people live in {place}?",
        "Is {exhibit} older than {subject}?", "What did {full_name} say about {topic}?", "Tell me a story of {place}.",
    ),
    "test": (
        "What is the capital of {place}?", "Describe {exhibit} in one sentence.", "Who invented the {product}?",
        "Why is {subject} important?", "What rhymes with {person}?", "Tell me something funny about {exhibit}.",
        "How old is {place}?", "Which color has a {product}?",
    ),
}  # fmt: skip
SHARE_OFF_TOPIC: dict[Split, float] = {"train": 0.5, "test": 0.8}
"""Of the requests that no tool fits; the others ask for a tool that is not offered, which is harder to see."""
MAX_PARALLEL_VALUES = 2
"""Only tools with as few are called twice in one answer: answers stay short enough for the demo's minutes."""

REFUSAL = "None of these functions can do that."


def generate(*, split: Split, num_rows: int, seed: int, unseen_tools: bool = False) -> Iterator[Row]:
    """Rows in the format of hermes-function-calling-v1.

    Args:
        split: whose phrasings and vocabulary to use.
        num_rows: how many rows to write.
        seed: the same seed writes the same rows on every machine.
        unseen_tools: use the tools that training never sees instead of those it does; each row then needs a call.
    """
    if unseen_tools and split != "test":
        raise ValueError(f"unseen tools belong to the test split, got split={split!r}")
    tools = [tool for tool in catalog() if tool.is_unseen == unseen_tools]
    name = "unseen" if unseen_tools else split
    written: set[str] = set()
    for index in range(num_rows):
        category = CATEGORY_PATTERN[split][index % len(CATEGORY_PATTERN[split])]
        if unseen_tools and category == "no_fitting_tool":
            category = "one_call"
        # The tools take turns, each cycle in another order, so that few rows already cover all of them.
        cycle, position = divmod(index, len(tools))
        order = random.Random(f"{seed}/{name}/cycle/{cycle}").sample(tools, len(tools))
        for attempt in range(100):
            rng = random.Random(f"{seed}/{name}/{index}/{attempt}")
            row = _row(rng, split, category, order[position], tools)
            if row["conversations"][1]["value"] not in written:
                break
        else:
            raise ValueError(f"cannot write {num_rows} different requests for {name}; row {index} keeps repeating")
        written.add(row["conversations"][1]["value"])
        yield {"id": f"embedded-{seed}-{name}-{index:06d}"} | row


def _row(rng: random.Random, split: Split, category: str, target: Tool, tools: Sequence[Tool]) -> Row:
    """One conversation: a request under some tools, and its answer."""
    if category == "parallel_calls" and target.num_values > MAX_PARALLEL_VALUES:
        target = rng.choice([tool for tool in tools if tool.num_values <= MAX_PARALLEL_VALUES])
    others = [tool for tool in tools if tool.domain != target.domain]
    offered = [target]
    if category == "several_tools":
        offered += rng.sample(others, rng.randint(1, 2))
    elif category == "parallel_calls":
        offered += rng.sample(others, rng.randint(0, 1))
    elif category == "no_fitting_tool":
        offered = rng.sample(others, rng.randint(1, 2))
    rng.shuffle(offered)
    schemas = json.dumps([tool.schema for tool in offered])
    request, calls = _request(rng, split, category, target, offered, tools)
    answer = "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls) or REFUSAL
    return {
        "conversations": [
            {"from": "system", "value": SYSTEM.replace("{tools}", schemas)},
            {"from": "human", "value": request},
            {"from": "gpt", "value": answer},
        ],
        "tools": schemas,
        "category": target.domain,
        "subcategory": category,
        "task": target.name,
    }


def _request(
    rng: random.Random, split: Split, category: str, target: Tool, offered: Sequence[Tool], tools: Sequence[Tool]
) -> tuple[str, list[dict[str, Any]]]:
    """A request and the calls that answer it."""
    calls: list[dict[str, Any]] = []
    if category == "no_fitting_tool":
        if rng.random() < SHARE_OFF_TOPIC[split]:
            template = rng.choice(OFF_TOPIC[split])
            text = re.sub(r"{(\w+)}", lambda slot: SLOTS[slot.group(1)].draw(rng, split)[0], template)
        else:
            domains = {tool.domain for tool in offered}
            text, _ = _ask(rng, split, rng.choice([tool for tool in tools if tool.domain not in domains]))
    else:
        asked = [target]
        if category == "parallel_calls":
            short = [tool for tool in offered if tool.num_values <= MAX_PARALLEL_VALUES]
            asked = [rng.choice(short), rng.choice(short)]
        parts = []
        for tool in asked:
            part, arguments = _ask(rng, split, tool)
            call = {"name": tool.name, "arguments": arguments}
            if call not in calls:
                parts.append(part)
                calls.append(call)
        text = rng.choice(CONNECTORS[split]).join(parts)
    return rng.choice(OPENINGS[split]) + text + rng.choice(CLOSINGS[split]), calls


def _ask(rng: random.Random, split: Split, tool: Tool) -> tuple[str, dict[str, Any]]:
    """A request for one tool and the arguments that answer it, in the order of the schema."""
    phrasing = rng.choice(tool.phrasings_of(split))
    phrasing = re.sub(r"\[([^\]]*)\]", lambda part: part.group(1) if rng.random() < 0.5 else "", phrasing)
    named = set(re.findall(r"{(\w+)}", phrasing))
    surfaces: dict[str, str] = {}
    arguments: dict[str, Any] = {}
    for name in (name for name in tool.slots if name in named):
        surface, value = tool.slots[name].draw(rng, split)
        # "From Paris to Paris" is no request: two arguments of one kind differ.
        while value in arguments.values() and not isinstance(value, int | float):
            surface, value = tool.slots[name].draw(rng, split)
        surfaces[name], arguments[name] = surface, value
    return phrasing.format(**surfaces), arguments
