"""One prediction against one example: exact calls, whatever their order."""

import json
from collections.abc import Sequence
from typing import Any

from tasks.contracts.comparison import Outcome, Score
from tasks.contracts.conversation import Call, Example
from tasks.contracts.prediction import Prediction, Reading


def score(example: Example, prediction: Prediction | None) -> Score:
    """Judge a prediction. A missing one is unscored, never wrong and never dropped."""
    num_arguments = sum(len(call.arguments) for call in example.expected)
    if prediction is None:
        return Score(
            example.id, Outcome.UNSCORED, "no prediction", Outcome.UNSCORED, False, False, None, num_arguments, 0
        )
    outcome, reason = _judge(example.expected, prediction.strict)
    lenient, _ = _judge(example.expected, prediction.lenient)
    if not example.expected and outcome is Outcome.CORRECT and prediction.lenient.calls:
        # Without this a model that cannot keep the format would pass for one that abstains.
        outcome, reason = Outcome.WRONG, f"writes a call to {_list(prediction.lenient.calls)}, not in the format told"
    calls = prediction.strict.calls or prediction.lenient.calls
    return Score(
        example_id=example.id,
        outcome=outcome,
        reason=reason + (", cut at the longest answer allowed" if prediction.was_cut else ""),
        lenient_outcome=lenient,
        was_parsed=prediction.strict.error is None,
        has_call=bool(calls),
        names_correct=_names(calls) == _names(example.expected) if example.expected else None,
        num_arguments=num_arguments,
        num_arguments_correct=_num_arguments_correct(example.expected, prediction.strict.calls),
    )


def same_value(expected: Any, given: Any) -> bool:
    """JSON equality: 5 and 5.0 are one number, True is no number, order counts in arrays only."""
    if isinstance(expected, bool) or isinstance(given, bool):
        return expected is given
    if isinstance(expected, int | float) and isinstance(given, int | float):
        return expected == given
    if isinstance(expected, dict) and isinstance(given, dict):
        return expected.keys() == given.keys() and all(same_value(expected[k], given[k]) for k in expected)
    if isinstance(expected, list) and isinstance(given, list):
        return len(expected) == len(given) and all(map(same_value, expected, given))
    return type(expected) is type(given) and bool(expected == given)


def same_call(expected: Call, given: Call) -> bool:
    """Whether two calls are equal."""
    return expected.name == given.name and same_value(dict(expected.arguments), dict(given.arguments))


def _judge(expected: Sequence[Call], reading: Reading) -> tuple[Outcome, str]:
    if reading.error is not None:
        return Outcome.WRONG, f"cannot be read: {reading.error}"
    if not expected:
        if reading.calls:
            return Outcome.WRONG, f"calls {_list(reading.calls)} where no function fits"
        return Outcome.CORRECT, "answers without a call"
    if not reading.calls:
        return Outcome.WRONG, f"makes no call instead of {_list(expected)}"
    # Equality is transitive, so that taking the first match is the best match.
    remaining = list(reading.calls)
    missing = []
    for call in expected:
        match = next((given for given in remaining if same_call(call, given)), None)
        if match is None:
            missing.append(call)
        else:
            remaining.remove(match)
    if not missing and not remaining:
        return Outcome.CORRECT, "all calls as expected"
    return Outcome.WRONG, _difference(missing, remaining)


def _difference(missing: Sequence[Call], extra: Sequence[Call]) -> str:
    """Why calls differ, said of the first pair that shares a name, or else of the names."""
    for call in missing:
        for given in extra:
            if call.name == given.name:
                return f"{call.name}: " + "; ".join(_argument_differences(call, given))
    parts = []
    if missing:
        parts.append(f"does not call {_list(missing)}")
    if extra:
        parts.append(f"calls {_list(extra)} which is not asked for")
    return ", ".join(parts)


def _argument_differences(expected: Call, given: Call) -> list[str]:
    problems = []
    for name, value in expected.arguments.items():
        if name not in given.arguments:
            problems.append(f"{name} is missing")
        elif not same_value(value, given.arguments[name]):
            problems.append(f"{name} is {_short(given.arguments[name])} instead of {_short(value)}")
    problems += [f"{name} was not asked for" for name in given.arguments if name not in expected.arguments]
    return problems


def _num_arguments_correct(expected: Sequence[Call], given: Sequence[Call]) -> int:
    """Right arguments, each given call serving the expected call of its name that it fits best."""
    remaining, correct = list(given), 0
    for call in expected:

        def fit(other: Call, call: Call = call) -> int:
            return sum(n in other.arguments and same_value(v, other.arguments[n]) for n, v in call.arguments.items())

        candidates = [other for other in remaining if other.name == call.name]
        if candidates:
            best = max(candidates, key=fit)
            correct += fit(best)
            remaining.remove(best)
    return correct


def _names(calls: Sequence[Call]) -> list[str]:
    return sorted(call.name for call in calls)


def _list(calls: Sequence[Call]) -> str:
    return " and ".join(call.name for call in calls)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
