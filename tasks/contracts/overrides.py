"""Dotted assignments over settings: ``training.num_epochs=2``.

Prefect replaces a parameter whole, so a partial ``experiment`` from the command line would silently reset the rest;
assignments change one value each and leave the others.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from tasks.contracts.environment import looks_secret
from tasks.contracts.settings import Experiment

ENVIRONMENTS = {"env", "secret_env"}
"""Settings whose values may hold anything, a secret in the wrong place among it."""
CHOICE = re.compile(r"constrained-int|bool|str|literal\[.*\]|tuple\[.*\]")
"""What pydantic appends to a setting's name for each of the things that it may be."""


Model = TypeVar("Model", bound=BaseModel)


class SettingsError(ValueError):
    """One or more settings that cannot be used; the message lists all of them."""


def apply_overrides(
    values: dict[str, Any], overrides: Sequence[str], model: type[BaseModel] = Experiment
) -> dict[str, Any]:
    """Settings as plain values with each ``dotted.name=value`` applied; values are read as YAML scalars or lists.

    Args:
        model: what the settings are of.

    Raises:
        SettingsError: listing every assignment that has no ``=``, or names no setting.
    """
    result: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    problems: list[str] = []
    for override in overrides:
        name, equals, text = override.partition("=")
        path = name.strip().split(".")
        unknown = _unknown_part(path, model)
        if not equals:
            told = "an override" if _may_be_secret([], override) else repr(override)
            problems.append(f"{told} is not an assignment; write it as training.num_epochs=2")
        elif unknown:
            problems.append(unknown)
        else:
            target = result
            for part in path[:-1]:
                target[part] = dict(target.get(part) or {})
                target = target[part]
            try:
                target[path[-1]] = yaml.safe_load(text)
            except yaml.YAMLError:
                target[path[-1]] = text
            # YAML 1.1 reads 1e-3 as text; a number is what anyone means.
            if isinstance(target[path[-1]], str):
                target[path[-1]] = _number(text)
    if problems:
        raise SettingsError("\n".join(problems))
    return result


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under their dotted names: ``{"training.num_epochs": 2}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def read_experiment(values: dict[str, Any]) -> Experiment:
    """Validated settings.

    Raises:
        SettingsError: with one line for every value that is unknown, missing or out of range.
    """
    return read_settings(Experiment, values)


def read_settings(model: type[Model], values: dict[str, Any]) -> Model:
    """Validated settings of any model.

    Raises:
        SettingsError: with one line for every value that is unknown, missing or out of range.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(problem, model) for problem in _one_per_value(error))) from error


def _one_per_value(error: ValidationError) -> list[Any]:
    """The problems by the settings' own names; those of one that may be one thing or another are one."""
    found: list[Any] = []
    for problem in error.errors():
        where = tuple(part for part in problem["loc"] if not CHOICE.fullmatch(str(part)))
        if where != problem["loc"] and found and found[-1]["loc"] == where:
            found[-1]["msg"] += f", or: {problem['msg']}"
        else:
            found.append({**problem, "loc": where})
    return found


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _explain(problem: Any, model: type[BaseModel]) -> str:
    path = [str(part) for part in problem["loc"]]
    name = ".".join(path) or "the settings"
    if problem["type"] == "extra_forbidden":
        return _unknown_part(path, model) or f"{name}: unknown setting"
    if problem["type"] == "missing":
        return f"{name}: has no default and must be given, e.g. --set {name}=embedded"
    message = problem["msg"].removeprefix("Value error, ")
    # A model-level message already names its values; a field's needs the value that was refused.
    if problem["type"] == "value_error" or _may_be_secret(path, problem["input"]):
        return f"{name}: {message}"
    return f"{name}={problem['input']!r}: {message}"


def _may_be_secret(path: Sequence[str], value: Any) -> bool:
    """Whether a value must not be quoted, for its setting's name or a name that it holds itself: errors end in logs."""
    return any(name in ENVIRONMENTS or looks_secret(name) for name in [*path, *re.findall(r"\w+", repr(value))])


def _group_of(annotation: Any) -> type[BaseModel] | None:
    """The group of settings that a setting is, or may be where it is not empty (``EndpointSettings | None``)."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _unknown_part(path: Sequence[str], model: type[BaseModel]) -> str | None:
    """What is wrong with a setting's dotted name, or None."""
    field = None
    for depth, part in enumerate(path):
        field = model.model_fields.get(part)
        if field is None:
            prefix = ".".join(path[:depth])
            names = [f"{prefix}.{name}" if prefix else name for name in model.model_fields]
            # By the last part alone: with what all of them begin with, any two would be close.
            close = difflib.get_close_matches(part, list(model.model_fields), n=1, cutoff=0.5)
            hint = f"did you mean {'.'.join([*path[:depth], *close])}?" if close else "there are: " + ", ".join(names)
            return f"{'.'.join(path)}: unknown setting; {hint}"
        if (group := _group_of(field.annotation)) is not None:
            model = group
        elif depth < len(path) - 1:
            return f"{'.'.join(path)}: unknown setting; {'.'.join(path[: depth + 1])} has no parts"
    if field is not None and field.annotation is model:
        return f"{'.'.join(path)}: is a group of settings; set one of {', '.join(model.model_fields)}"
    return None
