"""Changed training rows: names without meaning, other orders, further tools, and requests that no tool fits.

Masking follows Hammer (Q. Lin et al., Hammer: Robust Function-Calling for On-Device Language Models via Function Masking,
2024): with names that mean nothing, the model has to read what a function is described to do.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tasks.contracts.conversation import (
    Call,
    Example,
    Message,
    Tool,
    cut_at_calls,
    example_from_record,
    example_to_record,
)
from tasks.contracts.settings import AugmentationSettings, DatasetSettings
from tasks.dataset.rendering.encode import Encoder, Ids
from tasks.dataset.rendering.family import Family, segments_of

PLAIN_KEYWORDS = {"type", "properties", "required", "additionalProperties", "description", "title"}


OUTCOMES = {
    "masked": "functions and parameters have names without meaning",
    "not_masked_no_tools": "chosen to be masked, but no tools are offered",
    "not_masked_told_by_name": "chosen to be masked, but the system message names a function",
    "not_masked_schema": "chosen to be masked, but a schema refers to parameters outside properties and required",
    "shuffled": "tools in an order of the row's own",
    "not_shuffled": "fewer than two tools, which have no other order",
    "distractors_added": "tools of other rows are offered as well",
    "fewer_distractors": "... fewer than asked for: the training rows have no more",
    "no_distractors": "offers no tools, and so none of other rows, or the training rows have no others",
    "irrelevance_added": "added: another row without the tools that fit",
    "irrelevance_no_call": "chosen for such a twin, but calls nothing",
    "irrelevance_no_other_tool": "chosen for such a twin, but offers only what it calls",
    "irrelevance_too_long": "chosen for such a twin, which would be over dataset.max_length_tokens",
    "unchanged_too_long": "taught as it was: changed, it would be over dataset.max_length_tokens",
}
"""What can become of a training row, in words; counted for what is written."""


def is_on(settings: AugmentationSettings) -> bool:
    """Whether anything is asked for."""
    shares = (settings.mask_names, settings.shuffle_tools, settings.num_distractor_tools, settings.irrelevance)
    return any(shares)


@dataclass(frozen=True, slots=True)
class Augmented:
    """Rows to write: records, their token ids, marked, and how often each of OUTCOMES came about."""

    records: list[dict[str, str]]
    tokens: list[Ids]
    counts: Counter[str]


class Augmenter:
    """Training records to changed and tokenised ones; made once per process.

    Args:
        pool: tools that may be offered besides a row's own; none of them is held out.
    """

    def __init__(self, settings: DatasetSettings, family: Family, tokenizer: Path, pool: Sequence[Tool]) -> None:
        self._settings, self._family, self._pool = settings, family, pool
        self._encoder = Encoder(tokenizer)

    def __call__(self, records: Sequence[Mapping[str, str]]) -> Augmented:
        """The rows to write; one that is now over-long is given back as it was."""
        result = Augmented([], [], Counter())
        for record in records:
            original = example_from_record(record)
            for example, outcomes in augment(original, self._settings, self._pool):
                if example is None:
                    result.counts.update(outcomes)
                    continue
                tokens = self._encode(example)
                if len(tokens) > self._settings.max_length_tokens:
                    if example.id != original.id:
                        result.counts["irrelevance_too_long"] += 1
                        continue
                    example, tokens, outcomes = original, self._encode(original), ["unchanged_too_long"]
                result.records.append(_record(example))
                result.tokens.append(tokens)
                result.counts.update(outcomes)
        return result

    def _encode(self, example: Example) -> Ids:
        return self._encoder.conversation(segments_of(self._family, example))


def _record(example: Example) -> dict[str, str]:
    # The category of a conversation is that of what a test would ask of it.
    return example_to_record(example) | {"category": cut_at_calls(example)[0].category}


def augment(
    example: Example, settings: DatasetSettings, pool: Sequence[Tool]
) -> list[tuple[Example | None, list[str]]]:
    """The row as the settings change it and, where it is chosen for that, its twin that no tool fits; each with its OUTCOMES.

    A twin that cannot be is None.
    """
    wanted = settings.augmentation
    draw = random.Random(hashlib.sha256(f"{settings.seed}\0augment\0{example.id}".encode()).digest())
    # Every row draws the same numbers, so that one setting does not change what another chooses.
    is_masked, is_twinned = draw.random() < wanted.mask_names, draw.random() < wanted.irrelevance
    more = _others(example, pool, wanted.num_distractor_tools, draw) if example.tools else []
    outcomes = _of_distractors(len(more), wanted.num_distractor_tools)
    changed = replace(example, tools=(*example.tools, *more))
    rows: list[tuple[Example | None, list[str]]] = [(changed, outcomes)]
    if is_twinned:
        twin, outcome = _without_fitting_tools(changed, wanted.irrelevance_answer)
        rows.append((twin, [outcome, *(outcomes if twin else ())]))
    if is_masked:
        rows = [(_masked(row, draw, done) if row else None, done) for row, done in rows]
    if wanted.shuffle_tools:
        rows = [(_shuffled(row, draw, done) if row else None, done) for row, done in rows]
    return rows


def _of_distractors(count: int, wanted: int) -> list[str]:
    if not wanted:
        return []
    if not count:
        return ["no_distractors"]
    return ["distractors_added"] if count == wanted else ["distractors_added", "fewer_distractors"]


def _masked(example: Example, draw: random.Random, outcomes: list[str]) -> Example:
    outcomes.append(_obstacle(example) or "masked")
    return mask_names(example, draw)


def _shuffled(example: Example, draw: random.Random, outcomes: list[str]) -> Example:
    outcomes.append("shuffled" if len(example.tools) > 1 else "not_shuffled")
    return replace(example, tools=tuple(draw.sample(example.tools, len(example.tools))))


def _obstacle(example: Example) -> str | None:
    """Why names cannot be masked throughout the conversation, as one of OUTCOMES."""
    told = " ".join(message.content for message in example.messages if message.role == "system")
    if not example.tools:
        return "not_masked_no_tools"
    if any(tool["name"] in told for tool in example.tools):
        return "not_masked_told_by_name"
    has_more = any(tool["parameters"].keys() - PLAIN_KEYWORDS for tool in example.tools)
    return "not_masked_schema" if has_more else None


def mask_names(example: Example, draw: random.Random) -> Example:
    """Functions and their parameters renamed throughout the conversation, descriptions left as they are.

    Tool results are left as well: they are text of the tool's own. A conversation whose system message names a function, or
    whose schemas refer to parameters by name outside ``properties`` and ``required``, is left as it is.
    """
    if _obstacle(example):
        return example
    functions = {tool["name"]: f"function_{number}" for tool, number in _numbered(example.tools, draw)}
    parameters: dict[str, dict[str, str]] = {}
    tools = []
    for tool in example.tools:
        schema = tool["parameters"]
        properties = schema.get("properties", {})
        names_of = {name: f"parameter_{number}" for name, number in _numbered(list(properties), draw)}
        parameters[tool["name"]] = names_of
        masked = dict(schema)
        if properties:
            # A title repeats the name.
            masked["properties"] = {
                names_of[name]: {key: part for key, part in value.items() if key != "title"}
                for name, value in properties.items()
            }
            masked.pop("title", None)
        if isinstance(schema.get("required"), list):
            masked["required"] = [names_of.get(name, name) for name in schema["required"]]
        tools.append({**tool, "name": functions[tool["name"]], "parameters": masked})

    def rename(call: Call) -> Call:
        renamed = parameters[call.name]
        return Call(functions[call.name], {renamed[name]: value for name, value in call.arguments.items()})

    messages = tuple(replace(m, calls=tuple(map(rename, m.calls))) for m in example.messages)
    return replace(example, tools=tuple(tools), messages=messages, expected=tuple(map(rename, example.expected)))


def _numbered(values: Sequence[Any], draw: random.Random) -> list[tuple[Any, int]]:
    return list(zip(values, draw.sample(range(10 * len(values) + 10), len(values)), strict=True))


def _others(example: Example, pool: Sequence[Tool], count: int, draw: random.Random) -> list[Tool]:
    names = {tool["name"] for tool in example.tools}
    found: list[Tool] = []
    for tool in draw.sample(pool, min(len(pool), count + len(names) + count)):
        if tool["name"] not in names and len(found) < count:
            names.add(tool["name"])
            found.append(tool)
    return found


def _without_fitting_tools(example: Example, answer: str) -> tuple[Example | None, str]:
    """The conversation up to its first call, without the tools that it calls, or None; and which of OUTCOMES that is."""
    turns: list[Message] = [*example.messages, example.reply]
    first = next((i for i, turn in enumerate(turns) if turn.calls), None)
    if first is None:
        return None, "irrelevance_no_call"
    called = {call.name for call in turns[first].calls}
    tools = tuple(tool for tool in example.tools if tool["name"] not in called)
    if not tools:
        return None, "irrelevance_no_other_tool"
    messages, id_ = tuple(turns[:first]), f"{example.id}.irrelevant"
    return replace(example, id=id_, messages=messages, tools=tools, expected=(), answer=answer), "irrelevance_added"
