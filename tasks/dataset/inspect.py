"""What a dataset would be after preparation, and why each row that would not be used is not.

    python -m tasks.dataset inspect rows.jsonl
    python -m tasks.dataset inspect rows.parquet --format openai --model /models/my-model
    python -m tasks.dataset inspect s3://bucket/folder --set max_length_tokens=2048 --set num_test_rows=200

The very preparation runs, into a folder that is removed again (--keep names one that stays). Without --model, lengths are
counted in words instead of tokens. Exit status: 0 rows would be kept, 1 none would, 2 the settings cannot be used.
"""

import argparse
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tasks.contracts.conversation import Example, example_from_record
from tasks.contracts.files import read_json
from tasks.contracts.overrides import SettingsError, apply_overrides, read_experiment
from tasks.contracts.settings import DatasetSettings
from tasks.dataset.prepare import prepare
from tasks.dataset.quality import EXPLAINED, quality_markdown
from tasks.dataset.rendering.family import FAMILIES, Family, detect_family, family_for, segments_of
from tasks.dataset.sources.formats import FORMATS

NUM_SHOWN = 2
SHOWN_CHARACTERS = 2000
LEARNT, END = "[[[", "]]]"


def inspect(argv: Sequence[str]) -> int:
    """The command; returns its exit status."""
    # Rows hold what no terminal can show, as lone halves of a sign.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = _parse(argv)
    try:
        settings = _settings(arguments)
        family, tokenizer, unit = _family(arguments)
    except (SettingsError, ValueError) as error:
        print(f"error: these settings cannot be used:\n  {error}", file=sys.stderr)
        return 2
    folder = Path(arguments.keep) if arguments.keep else Path(tempfile.mkdtemp())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            print(f"error: --keep {folder} is not empty; name a new folder", file=sys.stderr)
            return 2
        tokenizer_file = folder / "tokenizer.json"
        tokenizer.save(str(tokenizer_file))
        prepare(settings, family, tokenizer_file, folder, _tell, may_be_empty=True)
        print(quality_markdown(read_json(folder / "quality.json"), unit))
        _show(folder, family)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


def _settings(arguments: argparse.Namespace) -> DatasetSettings:
    sources = [{"name": name, "format": arguments.format} for name in arguments.source]
    values = {"model": {"name": "embedded"}, "dataset": {"sources": sources}}
    return read_experiment(apply_overrides(values, [f"dataset.{text}" for text in arguments.set])).dataset


def _family(arguments: argparse.Namespace) -> tuple[Family, Any, str]:
    """The conversation format, a tokenizer, and what it counts."""
    if arguments.model:
        from transformers import AutoTokenizer

        model = Path(arguments.model)
        if not (model / "tokenizer.json").exists():
            raise ValueError(f"--model {model}: no tokenizer.json there; give a local folder of a model")
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
        family = family_for(arguments.family or detect_family(model), tokenizer)
        return family, tokenizer.backend_tokenizer, "tokens"
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"": 0}, unk_token=""))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return FAMILIES[arguments.family or "qwen2_5"], words, "words"


def _tell(num_rows: int) -> None:
    print(f"{num_rows} rows read", file=sys.stderr, flush=True)


def _show(folder: Path, family: Family) -> None:
    """Examples of what would not be used by reason, and one conversation as the model would see it."""
    for title, name in (("Rejected", "rejected.jsonl"), ("Left out", "left_out.jsonl")):
        shown: dict[str, list[str]] = {}
        with (folder / name).open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                rows = shown.setdefault(row["reason"], [])
                if len(rows) < NUM_SHOWN:
                    why = row.get("detail") or (f"is like {row['like']}" if "like" in row else "")
                    rows.append(f"  {row['id']} {why}")
        for reason, rows in shown.items():
            print(f"{title}: {reason} ({EXPLAINED[reason]}), as", *rows, sep="\n")
    # Not the whole files: they may be larger than this machine's memory.
    for name in ("train.parquet", "test.parquet"):
        for batch in pq.ParquetFile(folder / name).iter_batches(batch_size=1):
            _show_example(example_from_record(batch.to_pylist()[0]), family)
            return


def _show_example(example: Example, family: Family) -> None:
    """One conversation; of a long one the beginning, where its tools stand, and the end, where its calls do."""
    text = "".join(f"{LEARNT}{s.text}{END}" if s.is_answer else s.text for s in segments_of(family, example))
    if left_out := max(0, len(text) - SHOWN_CHARACTERS):
        half = SHOWN_CHARACTERS // 2
        text = f"{text[:half]}\n... ({left_out} characters left out here) ...\n{text[-half:]}"
    print(
        f"\n{example.id}, as the model would see it; the loss counts what stands between {LEARNT} and {END}:\n\n{text}"
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.dataset inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", nargs="+", help="a .jsonl, .json, .parquet or .csv file, a folder, a URL, or a hub id"
    )
    parser.add_argument(
        "--format", default="auto", choices=["auto", *FORMATS], help="of the rows (default: read off the first ones)"
    )
    parser.add_argument("--model", help="local folder of a model whose tokens are counted")
    parser.add_argument(
        "--family", choices=sorted(FAMILIES), help="conversation format (default: the model's, or qwen2_5)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of dataset; repeatable"
    )
    parser.add_argument("--keep", metavar="FOLDER", help="keep the prepared files there")
    return parser.parse_args(argv)
