"""What benchmarks ask, as keys of runs of words, so that training rows in which it stands can be left out."""

import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tasks.dataset.features import Keys, key, normalised, runs
from tasks.dataset.sources.files import DatasetNotFound

BFCL_PACKAGE = "bfcl_eval"
ASKED = {"question", "query", "prompt", "instruction", "content", "value", "text", "request"}
"""Names under which benchmarks keep what is asked."""


def find_benchmark(name: str) -> list[Path]:
    """The files of a benchmark: a file, those of a folder, or of the installed package behind ``bfcl``.

    Raises:
        DatasetNotFound: there are none.
    """
    if name == "bfcl":
        package = importlib.util.find_spec(BFCL_PACKAGE)
        if package is None or package.origin is None:
            raise DatasetNotFound(
                "dataset.benchmarks: 'bfcl' reads the questions in the package bfcl-eval, which is not installed here; "
                "pip install --no-deps bfcl-eval, or name the folder of its data"
            )
        path = Path(package.origin).parent / "data"
    else:
        path = Path(name).expanduser()
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.suffix in (".json", ".jsonl") and "possible_answer" not in p.parts)
    if not found:
        raise DatasetNotFound(f"dataset.benchmarks={name!r}: no .json or .jsonl file at {path}")
    return found


@dataclass(frozen=True)
class Benchmarks:
    """What benchmarks ask: keys of whole requests, and of runs of words in them."""

    requests: Keys
    runs: Keys


def read_benchmarks(names: Sequence[str], length: int) -> Benchmarks:
    """What the benchmarks ask, with runs of ``length`` words; shorter requests are found as a whole.

    Raises:
        DatasetNotFound: a benchmark is not there or is not JSON.
    """
    requests, found = [], [np.empty(0, np.uint64)]
    for text in (text for name in names for path in find_benchmark(name) for text in _asked(path)):
        words = normalised(text)
        requests.append(key(words))
        found.append(runs(words.split(), length))
    return Benchmarks(np.unique(np.array(requests, np.uint64)), np.unique(np.concatenate(found)))


def _asked(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DatasetNotFound(f"dataset.benchmarks: {path} is not UTF-8: {error}") from error
    try:
        values = [json.loads(text)]
    except ValueError:
        # BFCL's .json files hold a row a line.
        try:
            values = [json.loads(line) for line in text.split("\n") if line.strip()]
        except ValueError as error:
            raise DatasetNotFound(f"dataset.benchmarks: {path} is neither JSON nor JSONL: {error}") from error
    for value in values:
        yield from _texts(value, is_asked=isinstance(value, str))


def _texts(value: Any, *, is_asked: bool) -> Iterator[str]:
    if isinstance(value, str):
        if is_asked:
            yield value
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry, is_asked=is_asked)
    elif isinstance(value, dict) and value.get("role", value.get("from", "user")) in ("user", "human"):
        for name, entry in value.items():
            yield from _texts(entry, is_asked=name in ASKED)
