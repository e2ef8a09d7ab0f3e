"""When a value that a model gave is the one that was expected."""

import json
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

_FOLDED = re.compile(r"[ ,./\-_*^]")


@dataclass(frozen=True, slots=True)
class Rules:
    """How strictly texts are compared.

    Attributes:
        folds_text: letter case, spaces, `` ,./-_*^`` and the kind of quotes are forgiven, as by BFCL's checker. Otherwise texts
            are the same to the letter, in whichever Unicode form they are written.
    """

    folds_text: bool = False


EXACT = Rules()
FOLDED = Rules(folds_text=True)


@dataclass(frozen=True, slots=True)
class Fields:
    """An object of which each field may have one of several values."""

    allowed: "dict[str, OneOf]"


@dataclass(frozen=True, slots=True)
class Items:
    """A list of which each item has its own allowed values."""

    items: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class OneOf:
    """What an argument may be: any of ``values`` (JSON values, :class:`Fields`, :class:`Items`), or left out."""

    values: tuple[Any, ...]
    may_be_missing: bool = False

    def accepts(self, given: Any, rules: Rules) -> bool:
        """Whether ``given`` is one of the values."""
        if len(self.values) == 1:
            return same_value(self.values[0], given, rules)
        return any(same_value(value, given, rules) for value in self.values)

    def __str__(self) -> str:
        texts = [short(value) for value in self.values[:3]] + ["..."] * (len(self.values) > 3)
        return " or ".join(texts)


def same_value(expected: Any, given: Any, rules: Rules = EXACT) -> bool:
    """JSON equality: 5 and 5.0 are one number, True is no number, order counts in arrays only.

    It goes down as far as ``expected`` does, however deep ``given`` is.
    """
    if isinstance(expected, str):
        return isinstance(given, str) and (expected == given or _text(expected, rules) == _text(given, rules))
    if isinstance(expected, bool) or isinstance(given, bool):
        return expected is given
    if isinstance(expected, int | float) and isinstance(given, int | float):
        return expected == given
    if isinstance(expected, Fields):
        return isinstance(given, dict) and _same_fields(expected, given, rules)
    if isinstance(expected, dict) and isinstance(given, dict):
        return expected.keys() == given.keys() and all(same_value(expected[k], given[k], rules) for k in expected)
    if isinstance(expected, Items):
        expected = list(expected.items)
    if isinstance(expected, list) and isinstance(given, list):
        return len(expected) == len(given) and all(
            same_value(e, g, rules) for e, g in zip(expected, given, strict=True)
        )
    return type(expected) is type(given) and bool(expected == given)


def _same_fields(expected: Fields, given: dict[str, Any], rules: Rules) -> bool:
    if given.keys() - expected.allowed.keys():
        return False
    return all(
        one_of.accepts(given[name], rules) if name in given else one_of.may_be_missing
        for name, one_of in expected.allowed.items()
    )


def _text(text: str, rules: Rules) -> str:
    text = text if text.isascii() else unicodedata.normalize("NFC", text)
    return _FOLDED.sub("", text).lower().replace("'", '"') if rules.folds_text else text


def kind(value: Any) -> str:
    """What a value is, for people."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true/false"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "text"
    return "list" if isinstance(value, list | Items) else "object"


def short(value: Any) -> str:
    """A value as JSON, cut to a readable length."""
    text = json.dumps(_plain(value), ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


def _plain(value: Any) -> Any:
    """One of the values that are allowed."""
    if isinstance(value, Fields):
        return {name: _plain(one_of.values[0]) for name, one_of in value.allowed.items() if one_of.values}
    if isinstance(value, Items):
        return [_plain(item) for item in value.items]
    return value
