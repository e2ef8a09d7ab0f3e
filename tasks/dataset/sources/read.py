"""Rows of a dataset, from wherever it lies, one at a time; what cannot be read is handed on as an error, not dropped."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tasks.contracts.settings import DatasetSettings
from tasks.dataset.embedded.generate import generate
from tasks.dataset.sources import glaive, hermes, openai, sharegpt, toolace, xlam
from tasks.dataset.sources.rows import Conversation, RowRejected

FORMATS: dict[str, Callable[[Mapping[str, Any]], Conversation]] = {
    "hermes": hermes.read,
    "glaive": glaive.read,
    "sharegpt": sharegpt.read,
    "xlam": xlam.read,
    "toolace": toolace.read,
    "openai": openai.read,
}
SUFFIXES = (".jsonl", ".json", ".parquet")


class DatasetNotFound(ValueError):
    """The dataset of the settings is not there."""


def is_file_name(name: str) -> bool:
    """Whether a dataset's name means a local file rather than a hub id."""
    return name.startswith(("/", "./", "../", "~")) or name.endswith(SUFFIXES) or Path(name).exists()


def check_dataset(settings: DatasetSettings) -> None:
    """Refuse, before anything is submitted, a dataset that cannot be there.

    Raises:
        DatasetNotFound: naming what was looked for.
    """
    if settings.name == "embedded" or not is_file_name(settings.name):
        return
    path = Path(settings.name).expanduser()
    if not path.is_file():
        raise DatasetNotFound(
            f"dataset.name={settings.name!r}: there is no such file ({path.resolve()}); give a {', '.join(SUFFIXES)} "
            "file, a dataset id on the hub, or 'embedded'"
        )
    if path.suffix not in SUFFIXES:
        raise DatasetNotFound(f"dataset.name={settings.name!r}: {path.suffix!r} is not one of {', '.join(SUFFIXES)}")


def read_rows(settings: DatasetSettings) -> Iterator[tuple[str, Mapping[str, Any] | RowRejected]]:
    """``(row id, row)`` in the order of the source.

    Raises:
        DatasetNotFound: the source is not there or cannot be reached.
    """
    if settings.name == "embedded":
        yield from _embedded(settings)
    elif is_file_name(settings.name):
        check_dataset(settings)
        yield from _file(Path(settings.name).expanduser())
    else:
        yield from _hub(settings)


def _embedded(settings: DatasetSettings) -> Iterator[tuple[str, Mapping[str, Any]]]:
    assert settings.max_rows is not None
    num_train = settings.max_rows - settings.num_test_rows - settings.num_unseen_tools_rows
    for rows in (
        generate(split="train", num_rows=num_train, seed=settings.seed),
        generate(split="test", num_rows=settings.num_test_rows, seed=settings.seed),
        generate(split="test", num_rows=settings.num_unseen_tools_rows, seed=settings.seed, unseen_tools=True),
    ):
        for row in rows:
            yield row["id"], row


def _file(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | RowRejected]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        index = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield f"{path.stem}-{index:06d}", row
                index += 1
    elif path.suffix == ".jsonl":
        with path.open("rb") as file:
            for index, line in enumerate(file):
                if line.strip():
                    yield f"{path.stem}-{index:06d}", _parse(line)
    else:
        try:
            rows = json.loads(path.read_bytes())
        except ValueError as error:
            raise DatasetNotFound(f"dataset.name={str(path)!r} is not JSON: {error}") from error
        if not isinstance(rows, list):
            raise DatasetNotFound(f"dataset.name={str(path)!r} must hold a list of rows, got {type(rows).__name__}")
        for index, row in enumerate(rows):
            is_row = isinstance(row, Mapping)
            yield f"{path.stem}-{index:06d}", row if is_row else RowRejected("not_a_row", f"{str(row)[:120]}")


def _parse(line: bytes) -> Mapping[str, Any] | RowRejected:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return RowRejected("not_json", f"{error}: {line[:120]!r}")
    return row if isinstance(row, Mapping) else RowRejected("not_a_row", f"{line[:120]!r}")


def _hub(settings: DatasetSettings) -> Iterator[tuple[str, Mapping[str, Any]]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(settings.name, settings.config, revision=settings.revision, split="train")
    except Exception as error:  # The library raises dozens of types for "not there"; all mean the same to the user.
        raise DatasetNotFound(
            f"dataset.name={settings.name!r} (config {settings.config}, revision {settings.revision}) cannot be had "
            f"from the hub: {type(error).__name__}: {error}\nCheck the name, HF_TOKEN and the network, or give a "
            "local file or 'embedded'"
        ) from error
    for index, row in enumerate(rows):
        yield str(row.get("id") or f"row-{index:06d}"), row
