"""Text to token ids at several times the speed of the tokenizers library, for the tokenizers that allow it.

Byte-level BPE never merges across the words that its pattern cuts a text into, nor across its special tokens. So the ids of a
word are looked up once, and BPE is asked for words that are new; turns that stand in many rows are kept whole. Where a
tokenizer does more than that, the library encodes the text itself, and so it does the parts of a text that hold more than plain
ASCII (what counts as a letter depends on the version of Unicode). Tests hold both ways equal, and :meth:`Encoder.check` does
at run time.
"""

import json
import re
from array import array
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
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
SMOLLM2_PATTERN = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
"""Each digit cut off first, by the library's ``Digits``, and the rest as GPT-2 does: white space ends before a digit as well."""
CLASSES_ON_ASCII = {
    r"\p{L}\p{N}]": "A-Za-z0-9]",
    r"\s\p{N}]": r"\s0-9]",
    r"\p{L}": "[A-Za-z]",
    r"\p{N}": "[0-9]",
    # What follows a run is never of the run's own class, so that there is nothing to step back for.
    "]+": "]++",
}


def _on_ascii(pattern: str) -> str:
    for unicode, ascii_ in CLASSES_ON_ASCII.items():
        pattern = pattern.replace(unicode, ascii_)
    return pattern


# Only patterns that are known here: one more is a line, and a translator of any pattern would be a book.
ON_ASCII = {pattern: _on_ascii(pattern) for pattern in (GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN, SMOLLM2_PATTERN)}
"""What the patterns mean on plain ASCII."""
NORMALIZERS_WITHOUT_EFFECT = (None, "NFC", "NFD", "NFKC", "NFKD")
"""On plain ASCII."""
PLAIN = re.compile(r"[\x20-\x7e\t\n\r]*+")
BEFORE_A_WORD = re.compile(r"(?<=[!-~])(?= [A-Za-z])")
"""Where all of the patterns cut, whatever stands around: the space begins a word, and nothing before it goes on over it."""
BYTE_LEVEL = str.maketrans({" ": "\u0120", "\n": "\u010a", "\t": "\u0109", "\r": "\u010d"})
"""How ``ByteLevel`` writes the signs of plain ASCII that it does not leave as they are."""
MAX_WORDS = 1 << 17
MAX_TURNS = 8192
MAX_KEPT = 8_000
"""Characters of a turn that is kept for the next row; with the two above, at most some 100 MB a process."""

Ids = npt.NDArray[np.int32]


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

    def __call__(self, text: str) -> Ids:
        """Token ids of a text, special tokens in it included and none added, [tokens]."""
        if not self.is_fast:
            return np.frombuffer(self._slowly(text), np.int32)
        turns = self._special.split(text) if self._special else [text]
        parts = [self._turn(turn) if len(turn) <= MAX_KEPT else self._encode_turn(turn) for turn in turns]
        return np.frombuffer(b"".join(parts), np.int32)

    def conversation(self, segments: Sequence[Segment]) -> Ids:
        """The ids of a conversation's segments, tokenised apart, those of answers as ``~id``, [tokens]."""
        return np.concatenate([~self(part.text) if part.is_answer else self(part.text) for part in segments])

    def check(self, segments: Sequence[Segment]) -> None:
        """Hold a conversation against the library.

        Raises:
            EncodingDiffers: nothing that was encoded so may be used.
        """
        for segment in segments:
            theirs = np.frombuffer(self._slowly(segment.text), np.int32)
            if not np.array_equal(self(segment.text), theirs):
                raise EncodingDiffers(
                    f"token ids differ from the tokenizer's own: {theirs[:20].tolist()} are {segment.text[:200]!r}; "
                    "please report the model whose tokenizer this is"
                )

    # Ids as bytes of int32, since joining those costs a fraction of what as many Python numbers do.
    def _encode_turn(self, text: str) -> bytes:
        if text in self._added:
            return self._slowly(text)
        if len(self._ids) > MAX_WORDS:
            self._ids.clear()
        if PLAIN.fullmatch(text):
            return self._plainly(text)
        pieces = BEFORE_A_WORD.split(text)
        return b"".join([self._plainly(p) if PLAIN.fullmatch(p) else self._slowly(p) for p in pieces])

    def _plainly(self, text: str) -> bytes:
        ids = self._ids
        return b"".join([ids[word] for word in self._words.findall(text)])

    def _slowly(self, text: str) -> bytes:
        return array("i", self._tokenizer.encode(text, add_special_tokens=False).ids).tobytes()


class _Words(dict[str, bytes]):
    """The ids of words in plain ASCII, of which BPE is asked for new ones."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._bpe = tokenizer.model

    def __missing__(self, word: str) -> bytes:
        tokens = self._bpe.tokenize(word.translate(BYTE_LEVEL))
        ids = self[word] = array("i", [token.id for token in tokens]).tobytes()
        return ids


def marked(ids: Ids) -> tuple[Ids, npt.NDArray[np.bool_]]:
    """Token ids, and which of them belong to answers, of what :meth:`Encoder.conversation` gives."""
    is_answer = ids < 0
    return np.where(is_answer, ~ids, ids), is_answer


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
    if last.get("use_regex", True):
        if not splits:
            return ON_ASCII[GPT2_PATTERN]
        return ON_ASCII[SMOLLM2_PATTERN] if splits == [{"type": "Digits", "individual_digits": True}] else None
    if len(splits) != 1:
        return None
    (split,) = splits
    cuts_all = split.get("type") == "Split" and split.get("behavior") == "Isolated" and not split.get("invert")
    return ON_ASCII.get(split["pattern"].get("Regex", "")) if cuts_all else None
