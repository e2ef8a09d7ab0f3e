"""What a model answered to one example, read strictly and leniently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tasks.contracts.conversation import Call, calls_from_json, calls_to_json


@dataclass(frozen=True, slots=True)
class Reading:
    """The calls read from an answer, or why none could be read. No calls and no error: an answer in words."""

    calls: tuple[Call, ...]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answer.

    Attributes:
        example_id: which request.
        text: the answer as generated, without the end-of-turn token.
        strict: read by the format that the model was told, to the letter.
        lenient: read with the usual slips forgiven; never used for a gate.
        num_prompt_tokens, num_new_tokens: counts, padding left out.
        was_cut: the answer reached the longest length allowed.
        latency_s: seconds from the batch's start to its end, shared by the batch.
    """

    example_id: str
    text: str
    strict: Reading
    lenient: Reading
    num_prompt_tokens: int
    num_new_tokens: int
    was_cut: bool
    latency_s: float


def prediction_to_record(prediction: Prediction) -> dict[str, Any]:
    """A flat record, for Parquet."""
    record = asdict(prediction)
    record["text"] = _keepable(prediction.text)
    for reading in ("strict", "lenient"):
        del record[reading]
        value: Reading = getattr(prediction, reading)
        record[f"{reading}_calls"] = calls_to_json(value.calls)
        record[f"{reading}_error"] = None if value.error is None else _keepable(value.error)
    return record


def _keepable(text: str) -> str:
    """Without halves of characters (lone surrogates), which JSON can bring and no file can hold."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def prediction_from_record(record: Mapping[str, Any]) -> Prediction:
    """The inverse of :func:`prediction_to_record`."""
    return Prediction(
        example_id=record["example_id"],
        text=record["text"],
        strict=Reading(calls_from_json(record["strict_calls"]), record["strict_error"]),
        lenient=Reading(calls_from_json(record["lenient_calls"]), record["lenient_error"]),
        num_prompt_tokens=record["num_prompt_tokens"],
        num_new_tokens=record["num_new_tokens"],
        was_cut=record["was_cut"],
        latency_s=record["latency_s"],
    )
