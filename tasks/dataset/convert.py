"""One chunk of raw rows to a batch of columns: read, checked, tokenised, and described by keys. What a worker does."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tasks.contracts.by_identity import by_identity
from tasks.contracts.conversation import Example, Tool, calls_in, cut_at_calls, example_to_record
from tasks.contracts.settings import DatasetSettings
from tasks.dataset.features import NUM_BANDS, bands, key, normalised, runs, shingles
from tasks.dataset.ragged import ragged_column
from tasks.dataset.rendering.encode import Encoder, EncodingDiffers
from tasks.dataset.rendering.family import Family, segments_of
from tasks.dataset.sources.files import RawRow, parse
from tasks.dataset.sources.formats import FORMATS
from tasks.dataset.sources.literals import Repairs
from tasks.dataset.sources.read import Chunk
from tasks.dataset.sources.rows import Conversation, RowRejected

MAX_QUARANTINED_CHARACTERS = 20_000
"""Of a rejected row; more is cut there and marked."""

TEXTS = ("id", "messages", "tools", "expected", "answer", "source", "category")
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in TEXTS),
        ("source_index", pa.int16()),
        # Where the source itself says in which slice the row belongs (the embedded dataset does), else empty.
        ("fixed_slice", pa.string()),
        ("opening", pa.uint64()),
        ("exact", pa.uint64()),
        ("bands", pa.list_(pa.uint64(), NUM_BANDS)),
        ("shingles", pa.list_(pa.uint64())),
        ("tools_keys", pa.list_(pa.uint64())),
        ("requests", pa.list_(pa.uint64())),
        ("asked", pa.list_(pa.uint64())),
        ("word_runs", pa.list_(pa.uint64())),
        ("input_ids", pa.list_(pa.int32())),
        # Starts and ends of the answers in input_ids, by turns.
        ("answer_spans", pa.list_(pa.int32())),
    ]
)
MAX_CHARACTERS_PER_TOKEN = 256
"""No token of any tokenizer known here stands for more."""
NUM_CHECKED = 2
"""Rows of each chunk whose tokens are held against the tokenizers library's own."""
_NO_KEYS = np.empty(0, np.uint64)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that cannot be used: its reason code, what was wrong, and the row."""

    row_id: str
    source: str
    reason: str
    detail: str
    row: str

    def as_json(self) -> dict[str, str]:
        """The line of the quarantine file."""
        return {
            "id": self.row_id, "source": self.source, "reason": self.reason, "detail": self.detail, "row": self.row
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Converted:
    """What became of a chunk; ``len(batch) + len(rejected)`` are its rows."""

    source: str
    batch: pa.RecordBatch
    rejected: list[Rejected]
    repairs: Repairs


class Converter:
    """Converts chunks; made once per process.

    Args:
        tokenizer: a ``tokenizer.json``.
    """

    def __init__(self, settings: DatasetSettings, family: Family, tokenizer: Path) -> None:
        self._settings, self._family = settings, family
        self._encoder = Encoder(tokenizer)

    def __call__(self, chunk: Chunk) -> Converted:
        source = self._settings.sources[chunk.source]
        rejected: list[Rejected] = []
        repairs: Repairs = Counter()
        columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        for number, (row_id, raw) in enumerate(chunk.rows):
            try:
                used: Repairs = Counter()
                example = _example(row_id, FORMATS[chunk.format](parse(raw), used), source.title)
                asked = asked_of(example, self._settings)
                row = _record(example, asked[0].category)
                row |= self._tokens(example, is_checked=number < NUM_CHECKED) | self._keys(example, asked)
            except RowRejected as error:
                rejected.append(Rejected(row_id, source.title, error.reason, error.detail, _shown(raw)))
                continue
            except (EncodingDiffers, MemoryError):
                raise
            # Whatever one row does to a reader, a schema or a format: it is named, and the others are not lost for it.
            except Exception as error:
                fault = f"{type(error).__name__}: {str(error)[:300]}; a fault of the reader, please report the row"
                rejected.append(Rejected(row_id, source.title, "reader_failed", fault, _shown(raw)))
                continue
            repairs.update(used)
            row["source_index"] = chunk.source
            row["fixed_slice"] = _embedded_slice(example.id) if source.name == "embedded" else ""
            for name, values in columns.items():
                values.append(row[name])
        return Converted(source.title, _batch(columns), rejected, repairs)

    def _tokens(self, example: Example, *, is_checked: bool) -> dict[str, Any]:
        segments = segments_of(self._family, example)
        limit = self._settings.max_length_tokens
        if (num_characters := sum(len(segment.text) for segment in segments)) > limit * MAX_CHARACTERS_PER_TOKEN:
            raise RowRejected(
                "too_long", f"{num_characters} characters, which are over dataset.max_length_tokens={limit}"
            )
        if is_checked:
            self._encoder.check(segments)
        ids, spans = self._encoder.conversation(segments)
        if len(ids) > limit:
            raise RowRejected("too_long", f"{len(ids)} tokens, dataset.max_length_tokens={limit}")
        return {"input_ids": ids, "answer_spans": spans}

    def _keys(self, example: Example, asked: Sequence[Example]) -> dict[str, Any]:
        said = [normalised(message.content) for message in example.messages if message.role == "user"]
        tools, tools_keys = _tool_names(example.tools)
        run_length = self._settings.decontaminate_words
        word_runs = [runs(text.split(), run_length) for text in said] if run_length else []
        calls = [f"{call.name} {json.dumps(call.arguments, sort_keys=True)}" for t in calls_in(example) for call in t]
        is_wanted = bool(self._settings.near_duplicates)
        shingled = shingles(normalised(" ".join([*said, *calls])).split()) if is_wanted else _NO_KEYS
        return {
            "opening": key(said[0]),
            "exact": key("\0".join([*said, "", *tools, "", *calls])),
            "bands": bands(shingled),
            "shingles": shingled,
            "tools_keys": tools_keys,
            # Signs alone ("...") are no request that could be known from elsewhere.
            "requests": [key(text) for text in said if text],
            "asked": [key(text) for test in asked if (text := normalised(test.request))],
            "word_runs": np.unique(np.concatenate(word_runs)) if word_runs else _NO_KEYS,
        }


@by_identity
def _tool_names(tools: tuple[Tool, ...]) -> tuple[list[str], list[int]]:
    """Sorted names, and their keys."""
    names = sorted(tool["name"] for tool in tools)
    return names, [key(name) for name in names]


def _batch(columns: Mapping[str, list[Any]]) -> pa.RecordBatch:
    arrays = []
    for field in SCHEMA:
        values = columns[field.name]
        if field.name == "bands":
            flat = np.concatenate(values) if values else _NO_KEYS
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.uint64()), NUM_BANDS))
        elif pa.types.is_list(field.type):
            arrays.append(ragged_column(values, field.type.value_type))
        else:
            arrays.append(pa.array(values, field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def _example(row_id: str, conversation: Conversation, source: str) -> Example:
    reply = conversation.reply
    # Without its folder: the same file elsewhere makes the same dataset.
    label = source.rstrip("/").rsplit("/", 1)[-1]
    return Example(row_id, conversation.messages, conversation.tools, reply.calls, reply.content, label, "train")


def _record(example: Example, category: str) -> dict[str, Any]:
    record = example_to_record(example)
    del record["slice"]
    # What a test would ask of it: the last answer of most conversations is words, whatever was called before.
    record["category"] = category
    try:
        for text in record.values():
            text.encode()
    except UnicodeEncodeError as error:
        reason = f"a lone surrogate, which is no character, at {error.start}"
        raise RowRejected(
            "not_utf8", f"{reason}: {error.object[max(0, error.start - 40) : error.end + 40]!a}"
        ) from error
    return dict(record)


def asked_of(example: Example, settings: DatasetSettings) -> list[Example]:
    """What a test asks of a conversation."""
    turns = cut_at_calls(example)
    return turns if settings.test_turns == "every_call" else turns[:1]


def _embedded_slice(row_id: str) -> str:
    name = row_id.split("-")[2]
    return {"unseen": "unseen_tools", "test": "test"}.get(name, "train")


def _shown(raw: RawRow) -> str:
    """The row for the quarantine file, as text that any reader takes."""
    if isinstance(raw, RowRejected):
        return ""
    if isinstance(raw, bytes):
        text = raw[: 4 * MAX_QUARANTINED_CHARACTERS].decode("utf-8", "backslashreplace").rstrip("\r\n")
    else:
        text = json.dumps(raw, ensure_ascii=True, default=str)
    if len(text) > MAX_QUARANTINED_CHARACTERS:
        return f"{text[:MAX_QUARANTINED_CHARACTERS]} ... ({len(text)} characters)"
    return text
