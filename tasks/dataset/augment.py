"""Changed training rows: names without meaning, other orders, further tools, and requests that no tool fits.

Masking follows Hammer (Q. Lin et al., Hammer: Robust Function-Calling for On-Device Language Models via Function Masking,
2024): with names that mean nothing, the model has to read what a function is described to do.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from tasks.dataset.rendering.encode import Encoded, Encoder
from tasks.dataset.rendering.family import Family, segments_of

PLAIN_KEYWORDS = {"type", "properties", "required", "additionalProperties", "description", "title"}


def is_on(settings: AugmentationSettings) -> bool:
    """Whether anything is asked for."""
    shares = (settings.mask_names, settings.shuffle_tools, settings.num_distractor_tools, settings.irrelevance)
    return any(shares)


class Augmenter:
    """Training records to changed and tokenised ones; made once per process.

    Args:
        pool: tools that may be offered besides a row's own; none of them is held out.
    """

    def __init__(self, settings: DatasetSettings, family: Family, tokenizer: Path, pool: Sequence[Tool]) -> None:
        self._settings, self._family, self._pool = settings, family, pool
        self._encoder = Encoder(tokenizer)

    def __call__(self, records: Sequence[Mapping[str, str]]) -> list[tuple[dict[str, Any], Encoded]]:
        """Records with their ids and answer spans; one that is now over-long is given back as it was."""
        result = []
        for record in records:
            original = example_from_record(record)
            for example in augment(original, self._settings, self._pool):
                encoded = self._encode(example)
                if len(encoded[0]) <= self._settings.max_length_tokens:
                    result.append((_record(example), encoded))
                elif example.id == original.id:
                    result.append((_record(original), self._encode(original)))
        return result

    def _encode(self, example: Example) -> Encoded:
        return self._encoder.conversation(segments_of(self._family, example))


def _record(example: Example) -> dict[str, str]:
    # The category of a conversation is that of what a test would ask of it.
    return example_to_record(example) | {"category": cut_at_calls(example)[0].category}


def augment(example: Example, settings: DatasetSettings, pool: Sequence[Tool]) -> list[Example]:
    """The row as the settings change it and, where it is chosen for that, its twin that no tool fits."""
    wanted = settings.augmentation
    draw = random.Random(hashlib.sha256(f"{settings.seed}\0augment\0{example.id}".encode()).digest())
    # Every row draws the same numbers, so that one setting does not change what another chooses.
    is_masked, is_twinned = draw.random() < wanted.mask_names, draw.random() < wanted.irrelevance
    more = _others(example, pool, wanted.num_distractor_tools, draw) if example.tools else []
    changed = replace(example, tools=(*example.tools, *more))
    twin = _without_fitting_tools(changed, wanted.irrelevance_answer) if is_twinned else None
    result = [changed, *([twin] if twin else [])]
    if is_masked:
        result = [mask_names(entry, draw) for entry in result]
    if wanted.shuffle_tools:
        result = [replace(entry, tools=tuple(draw.sample(entry.tools, len(entry.tools)))) for entry in result]
    return result


def mask_names(example: Example, draw: random.Random) -> Example:
    """Functions and their parameters renamed throughout the conversation, descriptions left as they are.

    Tool results are left as well: they are text of the tool's own. A conversation whose system message names a function, or
    whose schemas refer to parameters by name outside ``properties`` and ``required``, is left as it is.
    """
    names = [tool["name"] for tool in example.tools]
    told = " ".join(message.content for message in example.messages if message.role == "system")
    if any(name in told for name in names) or any(tool["parameters"].keys() - PLAIN_KEYWORDS for tool in example.tools):
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


def _without_fitting_tools(example: Example, answer: str) -> Example | None:
    """The conversation up to its first call, without the tools that it calls; None where it calls none or no tool stays."""
    turns: list[Message] = [*example.messages, example.reply]
    first = next((i for i, turn in enumerate(turns) if turn.calls), None)
    if first is None:
        return None
    called = {call.name for call in turns[first].calls}
    tools = tuple(tool for tool in example.tools if tool["name"] not in called)
    if not tools:
        return None
    return replace(
        example, id=f"{example.id}.irrelevant", messages=tuple(turns[:first]), tools=tools, expected=(), answer=answer
    )
