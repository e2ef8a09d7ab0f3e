"""What both models come to on a public benchmark that is asked besides a run's own test."""

from __future__ import annotations

from dataclasses import dataclass

from tasks.contracts.comparison import PairedDifference, Share


@dataclass(frozen=True)
class SuiteModel:
    """One model on one category.

    Attributes:
        exact: right by our rules, texts to the letter.
        folded: the same with texts as the benchmark compares them (letter case, spaces and some signs forgiven).
        checker: right by the benchmark's own checker, where it can judge.
        agreement: of folded with the checker, row by row.
        call_rate: answers that make a call.
        num_unscored: answers that are missing.
    """

    exact: Share
    folded: Share
    checker: Share
    agreement: Share
    call_rate: Share
    num_unscored: int


@dataclass(frozen=True)
class SuiteCategory:
    """Both models on one category; ``paired`` by our rules, texts folded."""

    name: str
    n: int
    original: SuiteModel
    finetuned: SuiteModel
    paired: PairedDifference


@dataclass(frozen=True)
class Disagreement:
    """A row on which the benchmark's checker and our folded rules differ, and which deliberate difference that is."""

    example_id: str
    model: str
    ours: bool
    checker: bool
    reason: str


@dataclass(frozen=True)
class SuiteFigures:
    """A whole benchmark; the last category is all of them together."""

    name: str
    categories: tuple[SuiteCategory, ...]
    disagreements: tuple[Disagreement, ...]
