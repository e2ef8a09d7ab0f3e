"""A stretch of a rendered conversation."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """Text that the model is given, or an answer (with its end of turn) that the loss counts."""

    text: str
    is_answer: bool
