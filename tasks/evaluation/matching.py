"""Expected calls against given ones: which belong together, and how each pair differs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tasks.contracts.comparison import Fault
from tasks.contracts.conversation import Call, Tool
from tasks.evaluation.values import EXACT, Fields, Items, OneOf, Rules, kind, same_value, short

MAX_CALLS = 128
"""Calls of one answer that are looked at. No request asks for as many; an answer that repeats itself makes thousands."""


@dataclass(frozen=True, slots=True)
class ExpectedCall:
    """A call that is right with any of several values for each argument.

    Attributes:
        allowed: per parameter, what it may be.
        defaults: per optional parameter, what leaving it out means; given as that, it changes nothing.
    """

    name: str
    allowed: Mapping[str, OneOf]
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is wrong with a call."""

    fault: Fault
    text: str


@dataclass(frozen=True, slots=True)
class Matching:
    """Expected calls and given ones in pairs, so that as much as possible is right.

    Attributes:
        pairs: an expected and a given call of the same name, and how they differ; nothing: the call is right.
        missing: expected calls that no given one was left for.
        extra: given calls that no expected one was left for.
        num_arguments_correct: of those expected, over all pairs; those rightly left out count.
        num_given_correct: of those given, over all pairs; a declared default that was written out is right.
    """

    pairs: tuple[tuple[ExpectedCall, Call, tuple[Difference, ...]], ...]
    missing: tuple[ExpectedCall, ...]
    extra: tuple[Call, ...]
    num_arguments_correct: int
    num_given_correct: int

    @property
    def is_right(self) -> bool:
        """All expected calls, and no other."""
        return not self.missing and not self.extra and not any(differences for _, _, differences in self.pairs)


def exactly(call: Call, tools: Sequence[Tool]) -> ExpectedCall:
    """The call that has these arguments; one that has its declared default may as well be left out."""
    defaults = _defaults(call.name, tools)
    allowed = {
        name: OneOf((value,), bool(defaults) and name in defaults and same_value(defaults[name], value))
        for name, value in call.arguments.items()
    }
    return ExpectedCall(call.name, allowed, defaults)


def _defaults(name: str, tools: Sequence[Tool]) -> dict[str, Any]:
    for tool in tools:
        if tool["name"] == name:
            schema = tool["parameters"]
            properties = schema.get("properties") or {}
            required = schema.get("required") or ()
            return {
                n: part["default"]
                for n, part in properties.items()
                if isinstance(part, Mapping) and "default" in part and n not in required
            }
    return {}


def match(expected: Sequence[ExpectedCall], given: Sequence[Call], rules: Rules = EXACT) -> Matching:
    """The pairs with most right calls, and among those with most right arguments (an assignment problem).

    Only calls of one name can belong together, so each name is solved by itself.
    """
    given = given[:MAX_CALLS]
    pairs: list[tuple[ExpectedCall, Call, tuple[Difference, ...]]] = []
    missing: list[ExpectedCall] = []
    names = dict.fromkeys(e.name for e in expected)
    extra = [call for call in given if call.name not in names]
    correct = given_correct = 0
    for name in names:
        wanted = [e for e in expected if e.name == name]
        offered = [call for call in given if call.name == name]
        assigned = _assign(wanted, offered, rules)
        for row, column in assigned.items():
            differences = _differences(wanted[row], offered[column], rules)
            pairs.append((wanted[row], offered[column], differences))
            given_correct += _num_given_right(wanted[row], offered[column], rules)
            correct += _num_right(wanted[row], offered[column], rules) if differences else len(wanted[row].allowed)
        missing += [e for row, e in enumerate(wanted) if row not in assigned]
        taken = set(assigned.values())
        extra += [call for column, call in enumerate(offered) if column not in taken]
    return Matching(tuple(pairs), tuple(missing), tuple(extra), correct, given_correct)


def _assign(wanted: Sequence[ExpectedCall], offered: Sequence[Call], rules: Rules) -> dict[int, int]:
    """Which given call each expected one gets."""
    if not offered:
        return {}
    if len(wanted) == len(offered) == 1:
        return {0: 0}
    # Where runs are only deployed and watched there is no scipy.
    from scipy.optimize import linear_sum_assignment

    right = np.array([[_num_right(e, call, rules) for call in offered] for e in wanted], dtype=float)
    is_right = np.array([[not _differences(e, call, rules) for call in offered] for e in wanted])
    # One right call outweighs all arguments together.
    rows, columns = linear_sum_assignment(right + is_right * (right.sum() + 1), maximize=True)
    return {int(row): int(column) for row, column in zip(rows, columns, strict=True)}


def _num_right(expected: ExpectedCall, given: Call, rules: Rules) -> int:
    """Arguments as expected, those rightly left out included."""
    return sum(
        one_of.accepts(given.arguments[name], rules) if name in given.arguments else one_of.may_be_missing
        for name, one_of in expected.allowed.items()
    )


def _num_given_right(expected: ExpectedCall, given: Call, rules: Rules) -> int:
    """Arguments of the given call that may stand in it as they do."""
    return sum(
        expected.allowed[name].accepts(value, rules)
        if name in expected.allowed
        else name in expected.defaults and same_value(expected.defaults[name], value, rules)
        for name, value in given.arguments.items()
    )


def _differences(expected: ExpectedCall, given: Call, rules: Rules) -> tuple[Difference, ...]:
    found: list[Difference] = []
    for name, one_of in expected.allowed.items():
        if name not in given.arguments:
            if not one_of.may_be_missing:
                found.append(Difference("missing_argument", f"{name} is missing"))
        elif not one_of.accepts(given.arguments[name], rules):
            found.append(_wrong_value(name, one_of, given.arguments[name]))
    for name, value in given.arguments.items():
        if name not in expected.allowed:
            if name in expected.defaults and same_value(expected.defaults[name], value, rules):
                continue
            found.append(Difference("unexpected_argument", f"{name} was not asked for"))
    return tuple(found)


def _wrong_value(name: str, one_of: OneOf, given: Any) -> Difference:
    if not one_of.values:
        return Difference("unexpected_argument", f"{name} was not asked for")
    kinds = {"object" if isinstance(v, Fields) else "list" if isinstance(v, Items) else kind(v) for v in one_of.values}
    if kind(given) in kinds:
        return Difference("wrong_value", f"{name} is {short(given)} instead of {one_of}")
    wanted = " or ".join(sorted(kinds))
    return Difference("wrong_type", f"{name} is {kind(given)} {short(given)} instead of {wanted} {one_of}")
