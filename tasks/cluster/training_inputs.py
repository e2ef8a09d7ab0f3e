"""A model and rows of a named, fixed shape for the real training program: the same on every cluster, so that speeds compare."""

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.contracts.cluster_settings import ClusterCheck, Shape
from tasks.contracts.files import only_one, publish_folder, write_json
from tasks.contracts.settings import LoraSettings, TrainingSettings


@dataclass(frozen=True)
class ModelShape:
    """A Llama of random weights, and what each rank gets of it.

    Attributes:
        row_tokens: length of every row.
        per_device_batch_size: rows of a rank in a step.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    vocabulary: int
    row_tokens: int
    per_device_batch_size: int
    lora_rank: int


SHAPES: Mapping[Shape, ModelShape] = {
    "toy": ModelShape(128, 256, 2, 4, 2, 512, 128, 4, 8),
    "lora-1b": ModelShape(2048, 8192, 16, 32, 8, 128256, 4096, 4, 64),
    "lora-8b": ModelShape(4096, 14336, 32, 32, 8, 128256, 4096, 2, 64),
}
SHARD_SIZE = "2GB"


def training_settings(check: ClusterCheck, world_size: int) -> TrainingSettings:
    """What a run over ``world_size`` ranks is told: the same work for each rank, however many there are."""
    shape = SHAPES[check.training.shape]
    return TrainingSettings(
        num_epochs=1,
        max_steps_per_epoch=check.training.num_steps,
        global_batch_size=shape.per_device_batch_size * world_size,
        per_device_batch_size=shape.per_device_batch_size,
        save_every_steps=check.training.num_steps,
        log_every_steps=1,
        collective_timeout_minutes=check.stall_limit_s / 60,
        precision="float32" if check.training.shape == "toy" else "bfloat16",
        lora=LoraSettings(rank=shape.lora_rank, alpha=2 * shape.lora_rank),
    )


def folders(check: ClusterCheck) -> tuple[Path, Path]:
    """Where the model and the rows lie; made once, used by every later check."""
    root = Path(check.storage.shared) / "cache" / "cluster-check"
    num_rows = SHAPES[check.training.shape].per_device_batch_size * check.pool.world_size * check.training.num_steps
    return root / f"model-{check.training.shape}", root / f"rows-{check.training.shape}-{num_rows}"


def inputs_exist(check: ClusterCheck) -> bool:
    """Whether both are there, whole."""
    return all((folder / "manifest.json").exists() for folder in folders(check))


def make_inputs(check: ClusterCheck) -> dict[str, Any]:
    """Write both where they are not there yet."""
    model, rows = folders(check)
    shape = SHAPES[check.training.shape]
    for folder, make in ((model, _make_model), (rows, _make_rows)):
        # Another check on this storage may be making it, which takes minutes for the large shapes.
        with only_one(folder.with_name(f".{folder.name}.lock")):
            if (folder / "manifest.json").exists():
                continue
            temporary = folder.with_name(f".{folder.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            began = time.monotonic()
            make(temporary, shape, check)
            made = time.monotonic()
            write_json(temporary / "manifest.json", {"shape": check.training.shape})
            publish_folder(temporary, folder)
            print(
                f"{folder.name} made in {made - began:.0f} s, on storage for good after {time.monotonic() - made:.0f} s more",
                flush=True,
            )
    return {"model": str(model), "dataset": str(rows)}


def _make_model(folder: Path, shape: ModelShape, check: ClusterCheck) -> None:
    import torch
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=shape.row_tokens,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    dtype = torch.float32 if check.training.shape == "toy" else torch.bfloat16
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    # In parts, which are digested at once when training looks whether they are still the same.
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(shape.vocabulary)}, unk_token="w2"))  # noqa: S106 - a word
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w1", unk_token="w2").save_pretrained(  # noqa: S106
        folder
    )


def _make_rows(folder: Path, shape: ModelShape, check: ClusterCheck) -> None:
    import numpy as np
    import pyarrow as pa

    num_rows = shape.per_device_batch_size * check.pool.world_size * check.training.num_steps
    ids = np.random.default_rng(7).integers(3, shape.vocabulary, (num_rows, shape.row_tokens), dtype=np.int32)
    column = pa.array(list(ids), pa.list_(pa.int32()))
    table = pa.table({"input_ids": column, "labels": column})
    with pa.OSFile(str(folder / "train.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
