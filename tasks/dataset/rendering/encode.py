"""Text to token ids at several times the speed of the tokenizers library, for the tokenizers that allow it.

Byte-level BPE never merges across the words that its pattern cuts a text into, nor across its special tokens. So the ids of a
word are looked up once, and the library is asked for words that are new; turns that stand in many rows are kept whole. Where
a tokenizer does more than that, or a text holds more than plain ASCII (what counts as a letter depends on the version of
Unicode), the library encodes the text itself. Tests hold both ways equal, and :meth:`Encoder.check` does at run time.
"""

import itertools
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tasks.dataset.rendering.segment import Segment

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""What the library's ``ByteLevel`` cuts by (Radford et al., GPT-2, encoder.py)."""
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
"""Of Qwen2, Qwen2.5 and Qwen3."""
# Only patterns that are known here: one more is a line, and a translator of any pattern would be a book.
ON_ASCII = {
    pattern: pattern.replace(r"\p{L}\p{N}]", "A-Za-z0-9]").replace(r"\p{L}", "[A-Za-z]").replace(r"\p{N}", "[0-9]")
    for pattern in (GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN)
}
"""What the patterns mean on plain ASCII."""
NORMALIZERS_WITHOUT_EFFECT = (None, "NFC", "NFD", "NFKC", "NFKD")
"""On plain ASCII."""
PLAIN = re.compile(r"[\x20-\x7e\t\n\r]*+")
MAX_WORDS = 500_000
MAX_TURNS = 8192
MAX_KEPT = 32_000
"""Characters of a text whose turns are kept for the next row."""

Encoded = tuple[list[int], list[int]]
"""Token ids of a conversation, and starts and ends of its answers in them, by turns."""


class EncodingDiffers(RuntimeError):
    """The fast way gives other ids than the tokenizers library."""


class Encoder:
    """Encodes segments for one tokenizer.

    Args:
        tokenizer: a ``tokenizer.json``.
    """

    def __init__(self, tokenizer: Path) -> None:
        text = tokenizer.read_text(encoding="utf-8")
        self._tokenizer = Tokenizer.from_str(text)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        definition = json.loads(text)
        pattern = _word_pattern(definition)
        self.is_fast = pattern is not None
        self._words = re.compile(pattern or "")
        added = sorted((token["content"] for token in definition["added_tokens"]), key=len, reverse=True)
        self._added = frozenset(added)
        # With the longest first, as the library matches them.
        self._special = re.compile("(" + "|".join(map(re.escape, added)) + ")") if added else None
        self._ids = _Words(self._tokenizer)
        self._turn = lru_cache(maxsize=MAX_TURNS)(self._encode_turn)

    def __call__(self, text: str) -> list[int]:
        """Token ids of a text, special tokens in it included and none added."""
        if not self.is_fast:
            return self._slowly(text)
        turns = self._special.split(text) if self._special else [text]
        return list(
            itertools.chain.from_iterable(map(self._turn if len(text) <= MAX_KEPT else self._encode_turn, turns))
        )

    def conversation(self, segments: Sequence[Segment]) -> Encoded:
        """The ids of a conversation's segments, tokenised apart, and the spans of the answers."""
        ids: list[int] = []
        spans: list[int] = []
        for segment in segments:
            start = len(ids)
            ids += self(segment.text)
            if segment.is_answer and len(ids) > start:
                spans += (start, len(ids))
        return ids, spans

    def check(self, segments: Sequence[Segment]) -> None:
        """Hold a conversation against the library.

        Raises:
            EncodingDiffers: nothing that was encoded so may be used.
        """
        for segment in segments:
            if self(segment.text) != (theirs := self._slowly(segment.text)):
                raise EncodingDiffers(
                    f"token ids differ from the tokenizer's own: {theirs[:20]} are {segment.text[:200]!r}; "
                    "please report the model whose tokenizer this is"
                )

    def _encode_turn(self, text: str) -> tuple[int, ...]:
        if text in self._added or not PLAIN.fullmatch(text):
            return tuple(self._slowly(text))
        if len(self._ids) > MAX_WORDS:
            self._ids.clear()
        return tuple(itertools.chain.from_iterable(map(self._ids.__getitem__, self._words.findall(text))))

    def _slowly(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


class _Words(dict[str, tuple[int, ...]]):
    """The ids of words, of which new ones are asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = self[word] = tuple(self._tokenizer.encode(word, add_special_tokens=False).ids)
        return ids


def _word_pattern(definition: dict[str, Any]) -> str | None:
    """The pattern by which the tokenizer cuts words, where that is all it does before BPE and is known here; else None."""
    model = definition["model"]
    normalizer = definition.get("normalizer")
    plain_bpe = model["type"] == "BPE" and not model.get("dropout") and not model.get("continuing_subword_prefix")
    flags = ("lstrip", "rstrip", "single_word", *(["normalized"] if normalizer else []))
    if (
        not plain_bpe
        or model.get("end_of_word_suffix")
        or (normalizer and normalizer["type"]) not in NORMALIZERS_WITHOUT_EFFECT
        or any(token[flag] for token in definition["added_tokens"] for flag in flags)
    ):
        return None
    before = definition.get("pre_tokenizer") or {}
    *splits, last = before.get("pretokenizers") or [before]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not splits:
        return ON_ASCII[GPT2_PATTERN] if last.get("use_regex", True) else None
    if len(splits) > 1 or last.get("use_regex", True):
        return None
    (split,) = splits
    cuts_all = split.get("type") == "Split" and split.get("behavior") == "Isolated" and not split.get("invert")
    return ON_ASCII.get(split["pattern"].get("Regex", "")) if cuts_all else None
