"""One prediction against one example: the expected calls and no other, whatever their order."""

from collections import Counter
from collections.abc import Sequence

from tasks.contracts.call_check import CallProblem, check_call
from tasks.contracts.comparison import FAULTS, Fault, Outcome, Score
from tasks.contracts.conversation import Call, Example, Tool
from tasks.contracts.prediction import Prediction, Reading
from tasks.evaluation.matching import MAX_CALLS, ExpectedCall, Matching, exactly, match
from tasks.evaluation.values import EXACT, Rules

Judgement = tuple[Outcome, str, Fault | None, int, int]
"""Outcome, reason, fault, number of right arguments."""


def score(
    example: Example,
    prediction: Prediction | None,
    accepted: Sequence[ExpectedCall] | None = None,
    rules: Rules = EXACT,
) -> Score:
    """Judge a prediction. A missing one is unscored, never wrong and never dropped.

    Args:
        accepted: what is right, where more than exactly ``example.expected`` is.
    """
    if accepted is None:
        accepted = [exactly(call, example.tools) for call in example.expected]
    num_arguments = sum(len(call.allowed) for call in accepted)
    if prediction is None:
        nothing = Outcome.UNSCORED
        return Score(
            example.id, nothing, "no prediction", None, nothing, False, False, None, None, num_arguments, 0, 0, 0
        )
    strict, lenient = prediction.strict, prediction.lenient
    outcome, reason, fault, correct, given_correct = _judge(accepted, strict, example.tools, rules)
    is_same = strict.error is None and strict.calls == lenient.calls
    lenient_outcome = outcome if is_same else _judge(accepted, lenient, example.tools, rules)[0]
    if not accepted and outcome is Outcome.CORRECT and lenient.calls:
        # Without this a model that cannot keep the format would pass for one that abstains.
        outcome, fault = Outcome.WRONG, "not_in_format"
        reason = f"writes a call to {_names(lenient.calls)}, not in the format told"
    calls = strict.calls or lenient.calls
    return Score(
        example_id=example.id,
        outcome=outcome,
        reason=reason + (", cut at the longest answer allowed" if prediction.was_cut else ""),
        fault=fault,
        lenient_outcome=lenient_outcome,
        was_parsed=strict.error is None,
        has_call=bool(calls),
        fits_schema=_fits_schema(strict.calls, example.tools) if strict.calls else None,
        names_correct=sorted(c.name for c in calls) == sorted(c.name for c in accepted) if accepted else None,
        num_arguments=num_arguments,
        num_arguments_correct=correct,
        num_arguments_given=sum(len(call.arguments) for call in strict.calls),
        num_given_correct=given_correct,
    )


def _judge(expected: Sequence[ExpectedCall], reading: Reading, tools: Sequence[Tool], rules: Rules) -> Judgement:
    if reading.error is not None:
        return Outcome.WRONG, f"cannot be read: {reading.error}", "unreadable", 0, 0
    if not expected:
        if reading.calls:
            return Outcome.WRONG, f"calls {_names(reading.calls)} where no function fits", "needless_call", 0, 0
        return Outcome.CORRECT, "answers without a call", None, 0, 0
    if not reading.calls:
        return Outcome.WRONG, f"makes no call instead of {_names(expected)}", "no_call", 0, 0
    matching = match(expected, reading.calls, rules)
    right = matching.num_arguments_correct, matching.num_given_correct
    if matching.is_right and len(reading.calls) <= MAX_CALLS:
        return Outcome.CORRECT, "all calls as expected", None, *right
    fault, reason = _why(matching, len(reading.calls), tools)
    return Outcome.WRONG, reason, fault, *right


def _why(matching: Matching, num_given: int, tools: Sequence[Tool]) -> tuple[Fault, str]:
    """The first fault by its order, and everything that is wrong in words."""
    found: list[tuple[Fault, str]] = []
    offered = {tool["name"] for tool in tools}
    foreign = [call for call in matching.extra if call.name not in offered]
    others = [call for call in matching.extra if call.name in offered]
    if foreign:
        found.append(("not_offered", f"calls {_names(foreign)}, which is not offered"))
    if matching.missing and others:
        found.append(("wrong_function", f"calls {_names(others)} instead of {_names(matching.missing)}"))
    elif matching.missing:
        found.append(("missing_call", f"does not call {_names(matching.missing)}"))
    elif others:
        found.append(("extra_call", f"calls {_names(others)} once more than asked for"))
    if num_given > MAX_CALLS:
        found.append(("extra_call", f"makes {num_given} calls"))
    for _, given, differences in matching.pairs:
        found += [(d.fault, f"{given.name}: {d.text}") for d in differences]
    texts = list(dict.fromkeys(text for _, text in found))
    more = f"; and {len(texts) - 4} more" if len(texts) > 4 else ""
    return min((fault for fault, _ in found), key=FAULTS.index), "; ".join(texts[:4]) + more


def _fits_schema(calls: Sequence[Call], tools: Sequence[Tool]) -> bool:
    try:
        for call in calls[:MAX_CALLS]:
            check_call(call, tools)
    except CallProblem:
        return False
    return True


def _names(calls: Sequence[Call] | Sequence[ExpectedCall]) -> str:
    """Function names with how often each, the first few of many."""
    counts = Counter(call.name[:80] for call in calls)
    names = [f"{name} ({n} times)" if n > 1 else name for name, n in counts.items()]
    return " and ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
