"""What comparing two models on one test set comes to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Outcome(Enum):
    """Of one answer. What could not be judged is kept apart from what is wrong."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNSCORED = "unscored"


@dataclass(frozen=True, slots=True)
class Score:
    """One answer judged.

    Attributes:
        outcome: the strict reading against the expected calls, exactly.
        reason: in words, why.
        lenient_outcome: the same for the lenient reading.
        was_parsed: the answer could be read strictly (calls, or words).
        has_call: the strict reading, or failing that the lenient one, makes a call.
        names_correct: the same functions are called as often as expected; None where none is expected.
        num_arguments, num_arguments_correct: over the expected calls.
    """

    example_id: str
    outcome: Outcome
    reason: str
    lenient_outcome: Outcome
    was_parsed: bool
    has_call: bool
    names_correct: bool | None
    num_arguments: int
    num_arguments_correct: int


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
        parse_rate: answers that could be read strictly.
        call_rate: answers that make a call.
        num_unscored: answers left out of exact_match because they could not be judged.
    """

    exact_match: Share
    exact_match_lenient: Share
    call_name: Share
    arguments: Share
    parse_rate: Share
    call_rate: Share
    num_unscored: int


@dataclass(frozen=True)
class PairedDifference:
    """Fine-tuned minus original on the examples that both have scores for.

    Attributes:
        difference: of the shares of exact matches, with its 95 % paired bootstrap interval.
        p_value: exact McNemar test, two-sided.
        num_fixed: only the fine-tuned model is right; num_broken: only the original is.
    """

    n: int
    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None
    num_fixed: int
    num_broken: int


@dataclass(frozen=True)
class GroupFigures:
    """Both models on one group of examples: a category, a slice, or what the verdict looks at."""

    name: str
    title: str
    n: int
    original: ModelFigures
    finetuned: ModelFigures
    paired: PairedDifference


@dataclass(frozen=True)
class Gate:
    """One success criterion. A figure that is missing does not pass."""

    name: str
    description: str
    value: float | None
    threshold: float
    passed: bool


@dataclass(frozen=True)
class ComparedExample:
    """One request with both answers."""

    example_id: str
    kind: str
    category: str
    slice: str
    request: str
    expected: str
    original: str
    original_reason: str
    finetuned: str
    finetuned_reason: str


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
    examples: tuple[ComparedExample, ...]
