"""The formats that rows come in, and how one is told from another."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tasks.dataset.sources import glaive, hermes, openai, sharegpt, toolace, xlam
from tasks.dataset.sources.literals import Repairs
from tasks.dataset.sources.rows import Conversation

FORMATS: dict[str, Callable[[Mapping[str, Any], Repairs], Conversation]] = {
    "hermes": hermes.read,
    "glaive": glaive.read,
    "sharegpt": sharegpt.read,
    "xlam": xlam.read,
    "toolace": toolace.read,
    "openai": openai.read,
}
WORDS_ONLY = "hermes or sharegpt"


class UnknownFormat(ValueError):
    """Rows that look like none of the formats."""


def detect_format(rows: Sequence[Any], name: str) -> str:
    """The format of a source, read off the columns and roles of its first rows.

    Raises:
        UnknownFormat: naming the columns that were found; nothing is guessed.
    """
    seen = [f for row in rows if isinstance(row, Mapping) and (f := _format_of(row))]
    # Rows of words only are read alike in both formats but for the system turn, which ShareGPT keeps.
    counts = Counter(f for f in seen if f != WORDS_ONLY)
    ranked = counts.most_common()
    if len(ranked) > 1 and 10 * ranked[1][1] > ranked[0][1]:
        likes = " and ".join(f"{format_} ({count} rows)" for format_, count in ranked)
        raise UnknownFormat(f"{name}: the first {len(rows)} rows look like {likes}; say which with the source's format")
    found = ranked[0][0] if ranked else "sharegpt" if seen else None
    if found is None:
        columns = sorted({str(column) for row in rows if isinstance(row, Mapping) for column in row})
        raise UnknownFormat(
            f"{name}: the first {len(rows)} rows look like none of {', '.join(FORMATS)} "
            f"(columns: {', '.join(columns[:20]) or 'none'}); say which with the source's format"
        )
    return found


def _format_of(row: Mapping[str, Any]) -> str | None:
    if isinstance(row.get("messages"), list) and row["messages"]:
        return "openai"
    if {"query", "answers"} <= row.keys():
        return "xlam"
    if {"system", "chat"} <= row.keys():
        return "glaive"
    turns = row.get("conversations")
    if not isinstance(turns, list):
        return None
    if "system" in row and "tools" not in row:
        return "toolace"
    turns = [turn for turn in turns if isinstance(turn, Mapping)]
    roles = {str(turn.get("from")) for turn in turns}
    if roles & {"function_call", "observation"}:
        return "sharegpt"
    has_tags = any("<tool_call>" in str(turn.get("value")) or "<tools>" in str(turn.get("value")) for turn in turns)
    if has_tags or "tool" in roles:
        return "hermes"
    return WORDS_ONLY if roles & {"human", "gpt"} else None
