"""What comparing two models on one test set comes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal, get_args


class Outcome(Enum):
    """Of one answer. What could not be judged is kept apart from what is wrong."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNSCORED = "unscored"


Fault = Literal[
    "unreadable",
    "not_in_format",
    "no_call",
    "needless_call",
    "not_offered",
    "wrong_function",
    "missing_call",
    "extra_call",
    "missing_argument",
    "unexpected_argument",
    "wrong_type",
    "wrong_value",
]
"""What is wrong with an answer, the first that applies in this order."""
FAULTS: tuple[Fault, ...] = get_args(Fault)
FAULT_TITLES: Mapping[Fault, str] = {
    "unreadable": "a call that cannot be read",
    "not_in_format": "a call outside the format told",
    "no_call": "no call where one is needed",
    "needless_call": "a call where no function fits",
    "not_offered": "a function that is not offered",
    "wrong_function": "another of the functions offered",
    "missing_call": "fewer calls than asked for",
    "extra_call": "more calls than asked for",
    "missing_argument": "an argument is missing",
    "unexpected_argument": "an argument that was not asked for",
    "wrong_type": "an argument of another type",
    "wrong_value": "an argument with another value",
}


@dataclass(frozen=True, slots=True)
class Score:
    """One answer judged.

    Attributes:
        outcome: the strict reading against the expected calls, exactly.
        reason: in words, why.
        fault: what is wrong, for counting; None where nothing is, and where nothing could be judged.
        lenient_outcome: the outcome of the lenient reading.
        was_parsed: the answer could be read strictly (calls, or words).
        has_call: the strict reading, or failing that the lenient one, makes a call.
        fits_schema: every call of the strict reading is to a function on offer with arguments that its schema accepts; None
            where it makes none.
        names_correct: the same functions are called as often as expected; None where none is expected.
        num_arguments, num_arguments_correct: over the expected calls.
        num_arguments_given, num_given_correct: over the calls of the strict reading.
    """

    example_id: str
    outcome: Outcome
    reason: str
    fault: Fault | None
    lenient_outcome: Outcome
    was_parsed: bool
    has_call: bool
    fits_schema: bool | None
    names_correct: bool | None
    num_arguments: int
    num_arguments_correct: int
    num_arguments_given: int
    num_given_correct: int


@dataclass(frozen=True)
class Share:
    """``successes`` of ``n`` with its 95 % Wilson interval; no value where nothing was scored."""

    successes: int
    n: int
    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class ModelFigures:
    """One model on one group of examples.

    Attributes:
        exact_match: answered exactly as expected, read strictly.
        exact_match_lenient: the same, read leniently.
        call_name: the right functions called, of the requests needing a call.
        arguments: right arguments, of all expected ones.
        arguments_given: right arguments, of all that were given.
        parse_rate: answers that could be read strictly.
        call_rate: answers that make a call.
        fits_schema: answers whose calls are all to functions on offer with arguments that their schemas accept, of those that
            make a call in the format told.
        faults: wrong answers by what is wrong with them.
        num_unscored: answers left out of exact_match because they could not be judged.
    """

    exact_match: Share
    exact_match_lenient: Share
    call_name: Share
    arguments: Share
    arguments_given: Share
    parse_rate: Share
    call_rate: Share
    fits_schema: Share
    faults: Mapping[Fault, int]
    num_unscored: int


@dataclass(frozen=True)
class PairedDifference:
    """Fine-tuned minus original on the examples that both have scores for.

    Attributes:
        num_clusters: of examples that are independent of each other; n where no prompt stands twice.
        difference: of the shares of exact matches, with its 95 % paired bootstrap interval over clusters.
        p_value: exact test, two-sided: McNemar's, or its like for clusters.
        num_fixed: only the fine-tuned model is right; num_broken: only the original is.
    """

    n: int
    num_clusters: int
    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None
    num_fixed: int
    num_broken: int


@dataclass(frozen=True)
class GroupFigures:
    """Both models on one group of examples: a category, a slice, or what the verdict looks at.

    ``p_value_holm`` is the paired p-value corrected for the number of groups shown beside the one that the verdict rests on;
    None for that one, which is alone.
    """

    name: str
    title: str
    n: int
    original: ModelFigures
    finetuned: ModelFigures
    paired: PairedDifference
    p_value_holm: float | None


@dataclass(frozen=True)
class ChampionFigures:
    """The adapter that bore the title when the run asked it, on the requests that the verdict rests on.

    Attributes:
        version: its name and number in MLflow's registry.
        exact_match: its own; None where it could not be asked.
        paired: the run's fine-tuned model minus the champion; None likewise.
        statement: in words, or why it was not asked.
    """

    version: str
    exact_match: Share | None
    paired: PairedDifference | None
    statement: str


@dataclass(frozen=True)
class Gate:
    """One success criterion. A figure that is missing does not pass.

    Attributes:
        relation: of value and threshold where the gate passes.
        unit: of both; empty for plain numbers, ``%`` for shares between 0 and 1.
    """

    name: str
    description: str
    value: float | None
    threshold: float
    passed: bool
    relation: Literal[">=", "<", "<="]
    unit: str


@dataclass(frozen=True)
class Sensitivity:
    """What this many requests can show: how many would be needed for a difference of each size.

    Attributes:
        discordant: share of requests that exactly one of two models answers rightly, which the number depends on.
        needed: ``(difference, requests)``, the differences as shares.
    """

    discordant: float
    needed: tuple[tuple[float, int], ...]


@dataclass(frozen=True)
class ComparedExample:
    """One request with both answers.

    Attributes:
        cluster: the same for requests that are not independent of each other.
        kind: ``fixed``, ``broken``, ``still wrong``, ``kept`` or ``unscored``.
        expected: the expected calls, one a line, or ``(no call)``.
        original, finetuned: the answers as written.
        original_reason, finetuned_reason: the outcomes in words.
        original_calls, finetuned_calls: what was read from the answers, one call a line; empty where nothing was.
    """

    example_id: str
    cluster: str
    kind: str
    category: str
    slice: str
    request: str
    expected: str
    original: str
    original_reason: str
    original_calls: str
    finetuned: str
    finetuned_reason: str
    finetuned_calls: str


@dataclass(frozen=True)
class Comparison:
    """The result of a run.

    ``groups[0]`` is what the verdict rests on: requests that need a call, with tools seen in training.
    ``is_improvement`` says whether the fine-tuned model is better beyond chance there, ``statement`` in words.
    """

    passed: bool
    is_improvement: bool
    statement: str
    gates: tuple[Gate, ...]
    groups: tuple[GroupFigures, ...]
    sensitivity: Sensitivity
    examples: tuple[ComparedExample, ...]
