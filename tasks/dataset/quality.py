"""What is known of a prepared dataset, for people and for machines."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tasks.contracts.conversation import CATEGORIES, tools_in
from tasks.contracts.files import write_json, write_text
from tasks.dataset.augment import OUTCOMES
from tasks.pages.figures import histogram

SLICES = ("train", "test", "unseen_tools")
EXPLAINED = {
    "bad_call": "a call that cannot be read",
    "bad_tools": "tool definitions that cannot be used",
    "bad_turn": "a turn that is none",
    "contradictory_turns": "turns that cannot follow each other",
    "call_too_large": "arguments longer than are checked",
    "empty_answer": "an answer without words or calls",
    "missing_argument": "a call lacks a required argument",
    "no_answer": "the assistant never answers",
    "no_conversation": "no turns",
    "no_request": "nothing is asked",
    "not_a_row": "JSON, but no object",
    "not_csv": "a record that does not fit the header or is no CSV; a quote never closed takes the lines after it along",
    "not_json": "not JSON",
    "not_utf8": "not UTF-8",
    "reader_failed": "a fault of the reader: please report the row",
    "row_too_large": "larger than any conversation",
    "schema_mismatch": "an argument of the wrong type or value",
    "too_long": "more tokens than dataset.max_length_tokens",
    "undeclared_tool": "a call to a tool that is not offered",
    "unknown_argument": "a call has an argument that its tool does not",
    "unknown_role": "a turn of an unknown role",
    "exact_duplicate": "the same requests, tools and calls stand in another row",
    "near_duplicate": "nearly the same words stand in another row",
    "offers_a_held_out_tool": "offers tools of the unseen_tools slice beside others",
    "beyond_the_source's_max_rows": "the source has more rows than its max_rows",
    "test_side_beyond_num_test_rows": "could only test, and dataset.num_test_rows are chosen",
    "beyond_num_unseen_tools_rows": "could only test unseen tools, and enough are chosen",
    "beyond_max_rows": "more than dataset.max_rows",
    "beyond_the_source's_weight": "more than the source's share",
    "test_request_in_training": "its user asks what a test asks",
    "shares_words_with_the_test": "its user says dataset.decontaminate_words words in a row that a test row says",
    "shares_words_with_a_benchmark": "the same with a benchmark, or its user asks just what that asks",
}
"""Every reason in words."""


@dataclass
class Quality:
    """Counts of rows, slice by slice.

    Attributes:
        read: rows of all sources.
        rejected: rows that cannot be used, by reason; ``left_out``: usable ones in no slice.
        sources: rows read and taken for training by source.
        lengths: tokens of each conversation by slice.
        overlap: what the training still has in common with the tests.
        augmented: what became of the training rows, by :data:`tasks.dataset.augment.OUTCOMES`.
        packing: of the packs, where there are any.
        notes: where there are fewer rows than the settings ask for.
    """

    read: int
    rejected: Counter[str]
    left_out: Mapping[str, int]
    repairs: Counter[str]
    sources: dict[str, dict[str, int]]
    written: Counter[str] = field(default_factory=Counter)
    categories: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in SLICES})
    tools: dict[str, set[str]] = field(default_factory=lambda: {name: set() for name in SLICES})
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    overlap: dict[str, Any] = field(default_factory=dict)
    augmented: Counter[str] = field(default_factory=Counter)
    packing: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def count(self, slice_: str, rows: pa.RecordBatch) -> None:
        """Count rows that are written to a slice, by their columns ``category`` and ``tools``."""
        self.written[slice_] += len(rows)
        self.categories[slice_].update(rows.column("category").to_pylist())
        # Rows that offer the same tools are the rule.
        for text in rows.column("tools").unique().to_pylist():
            self.tools[slice_] |= {tool["name"] for tool in tools_in(text)}

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "rows": {
                "read": self.read,
                **{name: self.written[name] for name in SLICES},
                "rejected": dict(sorted(self.rejected.items())),
                "left_out": dict(self.left_out),
            },
            "sources": self.sources,
            "repairs": dict(sorted(self.repairs.items())),
            "categories": {name: {c: self.categories[name][c] for c in CATEGORIES} for name in SLICES},
            "num_tools": {name: len(self.tools[name]) for name in SLICES},
            "tokens": {name: _tokens(self.lengths[name]) for name in SLICES},
            "overlap": self.overlap,
            "augmentation": dict(sorted(self.augmented.items())),
            "packing": self.packing,
            "notes": self.notes,
        }


def write_quality(quality: Quality, folder: Path) -> None:
    """``quality.json``, ``quality.md`` and ``lengths.svg``."""
    values = quality.as_json()
    write_json(folder / "quality.json", values)
    write_text(folder / "quality.md", quality_markdown(values))
    named = {name: quality.lengths[name] for name in SLICES if len(quality.lengths[name])}
    write_text(folder / "lengths.svg", histogram(named, "tokens of a conversation", "share of the slice"))


def quality_markdown(quality: Mapping[str, Any], unit: str = "tokens") -> str:
    """The quality report as a person reads it; ``unit`` is what lengths were counted in."""
    rows, overlap = quality["rows"], quality["overlap"]
    lines = [
        "## Dataset",
        "",
        "| slice | rows | " + " | ".join(CATEGORIES) + f" | tools | mean {unit} | 95 % under | longest |",
        "|---|---:|" + "---:|" * (len(CATEGORIES) + 4),
    ]
    for name in SLICES:
        counts = " | ".join(str(quality["categories"][name][category]) for category in CATEGORIES)
        tokens = quality["tokens"][name]
        lines.append(
            f"| {name} | {rows[name]} | {counts} | {quality['num_tools'][name]} | {tokens['mean']} | {tokens['p95']} "
            f"| {tokens['max']} |"
        )
    num_rejected, num_out = sum(rows["rejected"].values()), sum(rows["left_out"].values())
    lines += ["", f"{rows['read']} rows read: {num_rejected} rejected, {num_out} usable but left out."]
    if len(quality["sources"]) > 1:
        lines += ["", "| source | read | rejected | usable | taught |", "|---|---:|---:|---:|---:|"]
        for name, counts in quality["sources"].items():
            lines.append(
                f"| {name} | " + " | ".join(str(counts[k]) for k in ("read", "rejected", "usable", "taught")) + " |"
            )
    lines += [f"\n**Fewer than asked for**: {note}" for note in quality["notes"]]
    for title, counts, words in (
        ("rejected", rows["rejected"], EXPLAINED),
        ("left out", rows["left_out"], EXPLAINED),
        ("augmentation of the training rows", quality["augmentation"], OUTCOMES),
    ):
        if counts:
            lines += ["", f"| {title} | rows | |", "|---|---:|---|"]
            lines += [f"| `{reason}` | {count} | {words[reason]} |" for reason, count in _largest_first(counts)]
    if quality["repairs"]:
        lines += [
            "",
            "Repaired while reading: " + ", ".join(f"{n} {k}" for k, n in _largest_first(quality["repairs"])) + ".",
        ]
    lines += [
        "",
        f"Test requests that also stand in the training rows: {overlap['exact_duplicates']}. " + _shared_runs(overlap),
    ]
    if packing := quality["packing"]:
        lines += [
            "",
            f"Packed: {packing['packs']} packs of {packing['capacity_tokens']} tokens, {packing['fill']:.1%} filled.",
        ]
    return "\n".join(lines) + "\n"


def _shared_runs(overlap: Mapping[str, Any]) -> str:
    if overlap["words"] is None:
        return "Shared runs of words were not looked for (dataset.decontaminate_words)."
    return (
        f"Test requests that share {overlap['words']} words in a row with any training request: {overlap['test']:.1%} "
        f"(unseen tools: {overlap['unseen_tools']:.1%})."
    )


def _largest_first(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _tokens(lengths: np.ndarray) -> dict[str, int]:
    if not len(lengths):
        return {"total": 0, "mean": 0, "p50": 0, "p95": 0, "max": 0}
    return {
        "total": int(lengths.sum()),
        "mean": round(float(lengths.mean())),
        "p50": int(np.percentile(lengths, 50)),
        "p95": int(np.percentile(lengths, 95)),
        "max": int(lengths.max()),
    }
