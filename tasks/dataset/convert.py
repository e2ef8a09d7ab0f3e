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
from tasks.dataset.features import NUM_BANDS, Keys, bands, key, normalised, runs, shingles
from tasks.dataset.ragged import ragged_column
from tasks.dataset.rendering.encode import Encoder, EncodingDiffers, Ids
from tasks.dataset.rendering.family import Family, segments_of
from tasks.dataset.sources.files import RawRow, Unread, parse
from tasks.dataset.sources.formats import FORMATS
from tasks.dataset.sources.literals import Repairs
from tasks.dataset.sources.read import Chunk
from tasks.dataset.sources.rows import Conversation, RowRejected

TEXTS = ("id", "messages", "tools", "expected", "answer", "source", "category")
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in TEXTS),
        ("source_index", pa.int16()),
        # Where the source itself says in which slice the row belongs (the embedded dataset does), else empty.
        ("fixed_slice", pa.string()),
        ("opening", pa.uint64()),
        ("exact", pa.uint64()),
        ("offered", pa.uint64()),
        ("bands", pa.list_(pa.uint64(), NUM_BANDS)),
        ("shingles", pa.list_(pa.uint64())),
        ("tools_keys", pa.list_(pa.uint64())),
        ("requests", pa.list_(pa.uint64())),
        ("asked", pa.list_(pa.uint64())),
        ("word_runs", pa.list_(pa.uint64())),
        # Ids, those of answers as ~id.
        ("tokens", pa.list_(pa.int32())),
    ]
)
MAX_CHARACTERS_PER_TOKEN = 256
"""No token of any tokenizer known here stands for more."""
NUM_CHECKED = 1
"""Rows of each chunk whose tokens are held against the tokenizers library's own."""
_NO_KEYS = np.empty(0, np.uint64)
# Made once: json.dumps makes an encoder at every call that is not all defaults.
_encode_sorted = json.JSONEncoder(sort_keys=True).encode


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that cannot be used: its reason code, what was wrong, and the whole row or, where there is no text or too much, its
    place.
    """

    id: str
    source: str
    reason: str
    detail: str
    row: str | None
    place: Mapping[str, Any] | None


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
        rows: list[dict[str, Any]] = []
        for number, (row_id, raw) in enumerate(chunk.rows):
            try:
                used: Repairs = Counter()
                example = _example(row_id, FORMATS[chunk.format](parse(raw), used), source.title)
                asked = asked_of(example, self._settings)
                row = _record(example, asked[0].category)
                row["tokens"] = self._tokens(example, is_checked=number < NUM_CHECKED)
                row |= self._keys(example, asked)
            except RowRejected as error:
                rejected.append(Rejected(row_id, source.title, error.reason, error.detail, *_whole(raw)))
                continue
            except (EncodingDiffers, MemoryError):
                raise
            # Whatever one row does to a reader, a schema or a format: it is named, and the others are not lost for it.
            except Exception as error:
                fault = f"{type(error).__name__}: {str(error)[:300]}; a fault of the reader, please report the row"
                rejected.append(Rejected(row_id, source.title, "reader_failed", fault, *_whole(raw)))
                continue
            repairs.update(used)
            row["source_index"] = chunk.source
            row["fixed_slice"] = _embedded_slice(example.id) if source.name == "embedded" else ""
            rows.append(row)
        return Converted(source.title, _batch(rows), rejected, repairs)

    def _tokens(self, example: Example, *, is_checked: bool) -> Ids:
        segments = segments_of(self._family, example)
        limit = self._settings.max_length_tokens
        if (num_characters := sum(len(segment.text) for segment in segments)) > limit * MAX_CHARACTERS_PER_TOKEN:
            raise RowRejected(
                "too_long", f"{num_characters} characters, which are over dataset.max_length_tokens={limit}"
            )
        if is_checked:
            self._encoder.check(segments)
        ids = self._encoder.conversation(segments)
        if len(ids) > limit:
            raise RowRejected("too_long", f"{len(ids)} tokens, dataset.max_length_tokens={limit}")
        return ids

    def _keys(self, example: Example, asked: Sequence[Example]) -> dict[str, Any]:
        plain = {m.content: normalised(m.content) for m in example.messages if m.role == "user"}
        said = [plain[message.content] for message in example.messages if message.role == "user"]
        requests = [plain.get(test.request, "") for test in asked]
        key_of = {text: key(text) for text in plain.values()}
        tools, tools_keys, offered = _tool_names(example.tools)
        run_length = self._settings.decontaminate_words
        word_runs = [runs(text.split(), run_length) for text in key_of] if run_length else []
        calls = [f"{call.name} {_encode_sorted(call.arguments)}" for t in calls_in(example) for call in t]
        is_wanted = bool(self._settings.near_duplicates)
        shingled = shingles(normalised(" ".join([*said, *calls])).split()) if is_wanted else _NO_KEYS
        return {
            "opening": key_of[said[0]],
            "exact": key("\0".join([*said, "", *tools, "", *calls])),
            "offered": offered,
            "bands": bands(shingled),
            "shingles": shingled,
            "tools_keys": tools_keys,
            # Signs alone ("...") are no request that could be known from elsewhere.
            "requests": [key_of[text] for text in said if text],
            "asked": [key_of[text] for text in requests if text],
            "word_runs": np.unique(np.concatenate(word_runs)) if word_runs else _NO_KEYS,
        }


@by_identity
def _tool_names(tools: tuple[Tool, ...]) -> tuple[list[str], Keys, int]:
    """Sorted names, their keys, and one key of all."""
    names = sorted(tool["name"] for tool in tools)
    return names, np.array([key(name) for name in names], np.uint64), key("\0".join(names))


def _batch(rows: Sequence[Mapping[str, Any]]) -> pa.RecordBatch:
    arrays = []
    for field in SCHEMA:
        values = [row[field.name] for row in rows]
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
            if not text.isascii():
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


def _whole(raw: RawRow) -> tuple[str | None, Mapping[str, Any] | None]:
    """The row for the quarantine file, as text that any reader takes, or its place."""
    if isinstance(raw, Unread):
        return raw.row, raw.place
    if isinstance(raw, bytes):
        return raw.decode("utf-8", "backslashreplace").rstrip("\r\n"), None
    return json.dumps(raw, ensure_ascii=True, default=str), None
