"""Numbers that tell, without the rows themselves, which rows are alike: keys, runs of words, MinHash bands.

All are 64-bit and the same on every machine, so that a million rows can be compared in arrays of NumPy.
MinHash: A. Broder, On the resemblance and containment of documents, 1997. Bands of rows: J. Leskovec, A. Rajaraman,
J. Ullman, Mining of Massive Datasets, chapter 3.4: pairs of similarity s share one of b bands of r with probability
``1 - (1 - s^r)^b``, here 16 bands of 4: 0.9998 at 0.8, 0.64 at 0.5; every pair found is then measured exactly.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]

NUM_BANDS, ROWS_PER_BAND = 16, 4
SHINGLE_WORDS = 3
_NUM_HASHES = NUM_BANDS * ROWS_PER_BAND
_rng = np.random.Generator(np.random.PCG64(20))
_MULTIPLIERS = _rng.integers(1, 1 << 63, _NUM_HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_ADDENDS = _rng.integers(0, 1 << 63, _NUM_HASHES, dtype=np.uint64)
_PUNCTUATION = (
    """.,;:!?"'()[]{}_`\u00b4\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f\u2026\u00a1\u00bf\u3002\uff0c\uff1f"""
)
_WITHOUT_PUNCTUATION = str.maketrans(dict.fromkeys(_PUNCTUATION, " "))
_STEP = np.uint64(0x9E3779B97F4A7C15)


def normalised(text: str) -> str:
    """A text without case, punctuation and runs of white space. Signs that mean something stay: ``5 - 3``, ``C++``."""
    return " ".join(text.lower().translate(_WITHOUT_PUNCTUATION).split())


def key(text: str) -> int:
    """A 64-bit key of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


_word_key = lru_cache(maxsize=1 << 16)(key)


def runs(words: Sequence[str], length: int) -> Keys:
    """Keys of every run of ``length`` words, each once, sorted. Empty where there are fewer words."""
    count = len(words) - length + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    hashes = np.fromiter((_word_key(word) for word in words), np.uint64, len(words))
    result = np.zeros(count, np.uint64)
    for offset in range(length):
        result = mixed(result * _STEP + hashes[offset : offset + count])
    return np.unique(result)


def shingles(words: Sequence[str]) -> Keys:
    """Keys of the runs of three words; a shorter text is one run."""
    return runs(words, min(SHINGLE_WORDS, max(1, len(words))))


def bands(shingled: Keys) -> Keys:
    """MinHash of a row's shingles in ``NUM_BANDS`` keys: rows that share one are likely alike. Zeros for no shingle."""
    if not len(shingled):
        return np.zeros(NUM_BANDS, np.uint64)
    smallest = mixed(shingled[None, :] * _MULTIPLIERS[:, None] + _ADDENDS[:, None]).min(axis=1)
    rows = smallest.reshape(NUM_BANDS, ROWS_PER_BAND)
    result = np.arange(1, NUM_BANDS + 1, dtype=np.uint64)
    for column in range(ROWS_PER_BAND):
        result = mixed(result * _STEP + rows[:, column])
    return result


def similarity(one: Keys, other: Keys) -> float:
    """Jaccard similarity of two sorted sets of keys; two empty ones are equal."""
    union = len(np.union1d(one, other))
    return 1.0 if union == 0 else len(np.intersect1d(one, other, assume_unique=True)) / union


def mixed(values: Keys) -> Keys:
    """Keys with every bit spread over all others, else close sums would have close keys.

    The finaliser of SplitMix64 (G. Steele, D. Lea, C. Flood, Fast splittable pseudorandom number generators, 2014).
    """
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    spread: Keys = values ^ (values >> np.uint64(31))
    return spread
