"""A model, rows and settings so small that a whole training takes seconds."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa

from tasks.contracts.settings import TrainingSettings

VOCABULARY, POSITIONS, NUM_ROWS = 64, 32, 48
SETTINGS = {
    "global_batch_size": 4,
    "per_device_batch_size": 1,
    "num_epochs": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "save_every_steps": 5,
    "log_every_steps": 1,
    "precision": "float32",
    "collective_timeout_minutes": 1.0,
}
TOTAL_STEPS = 24
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
}
"""Of a toy model of any family, by transformers' names."""


def make_model(folder: Path, *, seed: int = 1, is_tied: bool = False) -> Path:
    """A Llama of two layers with random weights, and a tokenizer of its few words; tied, its head is the embedding."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = LlamaConfig(
        **SIZES,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=is_tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w2"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w1", unk_token="w2").save_pretrained(
        folder
    )
    return folder


def make_rows(folder: Path, *, num_rows: int = NUM_ROWS, longest: int = 20, seed: int = 1) -> Path:
    """Rows in which each word follows from the one before: something to learn. Their lengths differ."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    ids, labels = [], []
    for _ in range(num_rows):
        row = [draw.randrange(VOCABULARY)]
        for _ in range(draw.randint(5, longest - 1)):
            row.append((5 * row[-1] + 3) % VOCABULARY)
        ids.append(row)
        labels.append([-100] * 3 + row[3:])
    integers = pa.list_(pa.int32())
    table = pa.table({"input_ids": pa.array(ids, integers), "labels": pa.array(labels, integers)})
    with pa.OSFile(str(folder / "train.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return folder


def arguments(root: Path, model: Path, dataset: Path, **changes: Any) -> dict[str, Any]:
    """What the training program is told."""
    return {
        "model": {"name": str(model)},
        "training": TrainingSettings(**(SETTINGS | changes)).model_dump(mode="json"),
        "storage": str(root),
        "dataset": str(dataset),
        "output": str(root / "training"),
    }


def points(job: Path) -> dict[int, dict[str, float]]:
    """The curve of a job, over all its attempts."""
    from tasks.contracts.attempt import read_points

    return dict(read_points(job))


def read_ledger(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
