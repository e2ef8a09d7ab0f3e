"""What ``infra/docker/compose.yaml`` starts: its services' commands and environments, with the variables filled in."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).resolve().parents[2] / "infra" / "docker" / "compose.yaml"
VARIABLE = re.compile(r"\$\{(?P<name>[A-Z_]+)(?::-(?P<default>[^}]*))?\}")


@dataclass(frozen=True)
class Service:
    """One service, as far as a machine without containers can start it."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]


def read_compose(values: Mapping[str, str], file: Path = FILE) -> dict[str, Service]:
    """Every service that has a command, with ``values`` in place of the variables.

    Raises:
        ValueError: a variable has neither a value nor a default.
    """
    services = yaml.safe_load(file.read_text())["services"]
    return {
        name: Service(
            name,
            tuple(filled(word, values) for word in service["command"]),
            {key: filled(value, values) for key, value in service.get("environment", {}).items()},
        )
        for name, service in services.items()
    }


def filled(text: str, values: Mapping[str, str]) -> str:
    """Text with its variables replaced, as compose does it."""

    def value_of(match: re.Match[str]) -> str:
        value = values.get(match["name"], match["default"])
        if value is None:
            raise ValueError(f"{match[0]} in {text!r} has neither a value nor a default")
        return value

    return VARIABLE.sub(value_of, str(text))


def variables(node: Any) -> set[str]:
    """Names of all variables in the file's values."""
    if isinstance(node, Mapping):
        return set().union(*(variables(value) for value in node.values()))
    if isinstance(node, list):
        return set().union(*(variables(value) for value in node), set())
    return {match["name"] for match in VARIABLE.finditer(str(node))}
