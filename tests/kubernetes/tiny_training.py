"""A model of a few thousand weights and rows of made-up tokens, for the real training program."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tasks.contracts.settings import ModelSettings, TrainingSettings

NUM_TOKENS = 64


def write_tiny_training(folder: Path) -> dict[str, Any]:
    """Make model and rows under ``folder``; what the training program is to be told."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=NUM_TOKENS, bos_token_id=0, eos_token_id=1, **shape)).save_pretrained(
        folder / "model"
    )
    words = {"<s>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, NUM_TOKENS)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<s>")), bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder / "model")
    rows = [[2 + (start + i) % (NUM_TOKENS - 2) for i in range(12)] for start in range(16)]
    kind = pa.list_(pa.int32())
    table = pa.table({"input_ids": pa.array(rows, kind), "labels": pa.array([[-100] * 4 + r[4:] for r in rows], kind)})
    (folder / "dataset").mkdir()
    with (
        pa.OSFile(str(folder / "dataset" / "train.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    training = TrainingSettings(global_batch_size=4, per_device_batch_size=2, save_every_steps=2, log_every_steps=1)
    return {
        "model": ModelSettings(name=str(folder / "model"), family="generic").model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
        "storage": str(folder),
        "dataset": str(folder / "dataset"),
        "output": str(folder / "training"),
    }
