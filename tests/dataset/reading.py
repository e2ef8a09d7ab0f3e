"""What several tests of the dataset need: a row read alone, and whole files prepared with a small tokenizer."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from tokenizers import Tokenizer, models, pre_tokenizers

from tasks.contracts.conversation import Example
from tasks.contracts.settings import DatasetSettings
from tasks.dataset.prepare import prepare
from tasks.dataset.rendering.family import FAMILIES
from tasks.dataset.sources.rows import Conversation
from tasks.dataset.stored import read_examples

# Every byte is a token: any text can be tokenised, and back.
BYTES = Tokenizer(
    models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
)
BYTES.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)


def read(source: Any, row: Mapping[str, Any]) -> Conversation:
    """A row read by a source format's module, whatever repairs it takes."""
    conversation: Conversation = source.read(row, Counter())
    return conversation


@dataclass(frozen=True)
class Prepared:
    """A prepared folder."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def quality(self) -> dict[str, Any]:
        return json.loads((self.folder / "quality.json").read_text())

    @property
    def train(self) -> list[Example]:
        return read_examples(self.folder / "train.parquet")

    @property
    def test(self) -> list[Example]:
        """Of the slices test and unseen_tools."""
        return read_examples(self.folder / "test.parquet")

    @property
    def tokens(self) -> pa.Table:
        with pa.memory_map(str(self.folder / "train.arrow")) as file:
            return pa.ipc.open_stream(file).read_all()

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def assert_all_accounted_for(self, num_rows: int) -> None:
        rows = self.quality["rows"]
        assert rows["read"] == num_rows
        kept = rows["train"] + rows["test"] + rows["unseen_tools"]
        assert kept + sum(rows["rejected"].values()) + sum(rows["left_out"].values()) == num_rows
        assert Counter(line["reason"] for line in self.lines("rejected.jsonl")) == rows["rejected"]
        assert Counter(line["reason"] for line in self.lines("left_out.jsonl")) == rows["left_out"]


def prepared(folder: Path, sources: Any, **settings: Any) -> Prepared:
    """Prepare sources with the family smollm2 and a token per byte."""
    folder.mkdir()
    BYTES.save(str(folder / "tokenizer.json"))
    values = {"sources": sources, "max_length_tokens": 50_000, "num_workers": 1} | settings
    return Prepared(folder, prepare(DatasetSettings(**values), FAMILIES["smollm2"], folder / "tokenizer.json", folder))


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
