"""The tools of the embedded dataset, read from ``tools.yaml`` and checked while they are read."""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tasks.dataset.embedded.slots import SLOTS, Record, Slot, Split

TEST_PHRASINGS = (1, 3)
"""Positions of the phrasings that only the test split uses."""


@dataclass(frozen=True, eq=False)
class Tool:
    """One function of the catalogue with the ways a person asks for it."""

    name: str
    domain: str
    description: str
    slots: Mapping[str, Slot]
    optional: frozenset[str]
    phrasings: tuple[str, ...]
    is_unseen: bool

    @property
    def schema(self) -> dict[str, Any]:
        """The tool as an OpenAI-style function definition with a JSON Schema of its parameters."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": {
                    "type": "object",
                    "properties": {name: slot.schema for name, slot in self.slots.items()},
                    "required": [name for name in self.slots if name not in self.optional],
                    "additionalProperties": False,
                },
            },
        }

    @property
    def num_values(self) -> int:
        """How many values a call carries at most, those of nested objects counted one by one."""
        return sum(len(slot.fields) if isinstance(slot, Record) else 1 for slot in self.slots.values())

    def phrasings_of(self, split: Split) -> tuple[str, ...]:
        """The phrasings of one split; an unseen tool appears in the test only, with all of its phrasings."""
        if self.is_unseen:
            return self.phrasings
        is_test = split == "test"
        return tuple(text for i, text in enumerate(self.phrasings) if (i in TEST_PHRASINGS) == is_test)


@functools.cache
def catalog() -> tuple[Tool, ...]:
    """Every tool, in the order of the file.

    Raises:
        ValueError: a phrasing leaves out a required parameter or names one that the tool does not have.
    """
    text = (Path(__file__).parent / "tools.yaml").read_text()
    return tuple(_tool(domain, entry) for domain, entries in yaml.safe_load(text).items() for entry in entries)


def _tool(domain: str, entry: Mapping[str, Any]) -> Tool:
    slots: dict[str, Slot] = {name: SLOTS[slot.removeprefix("maybe ")] for name, slot in entry["parameters"].items()}
    optional = frozenset(name for name, slot in entry["parameters"].items() if slot.startswith("maybe "))
    for phrasing in entry["phrasings"]:
        always = set(re.findall(r"{(\w+)}", re.sub(r"\[[^\]]*\]", "", phrasing)))
        anywhere = set(re.findall(r"{(\w+)}", phrasing))
        if always != set(slots) - optional or not anywhere <= set(slots):
            raise ValueError(
                f"tools.yaml: {entry['name']}: {phrasing!r} must name {sorted(set(slots) - optional)} outside "
                f"brackets and only {sorted(optional)} inside; it names {sorted(always)} and {sorted(anywhere - always)}"
            )
    return Tool(
        name=entry["name"],
        domain=domain,
        description=entry["description"],
        slots=slots,
        optional=optional,
        phrasings=tuple(entry["phrasings"]),
        is_unseen=entry.get("unseen", False),
    )
