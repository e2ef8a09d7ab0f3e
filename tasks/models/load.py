"""Loads a materialised model for the device at hand."""

import os
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DistributedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from tasks.contracts.settings import Precision


def quiet_loading() -> None:
    """No progress bars over weights, and no warnings that only TRL and PEFT could heed: people read a job's log."""
    # Both still use the older of transformers' two names.
    warnings.filterwarnings("ignore", r"`\w*gradient_checkpointing\w*` is deprecated", FutureWarning)
    transformers.utils.logging.disable_progress_bar()


def device() -> torch.device:
    """This rank's GPU, or the CPU where the pool gave none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


Resolved = Literal["float32", "mixed", "bfloat16"]


def resolve_precision(precision: Precision, *, on_cpu: Resolved = "bfloat16") -> Resolved:
    """What ``auto`` means on this rank's device: bfloat16 where it is multiplied natively, float32 where it is slower.

    Args:
        on_cpu: what to choose on a processor that multiplies bfloat16 natively.
    """
    if precision != "auto":
        return precision
    if device().type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    processor = torch.cpu.get_capabilities()
    return on_cpu if any(processor.get(feature) for feature in ("avx512_bf16", "amx_bf16", "bf16")) else "float32"


def load_model(folder: Path, precision: Resolved, *, num_shards: int = 1) -> PreTrainedModel:
    """The causal language model in ``folder`` on this rank's device.

    ``bfloat16`` and ``float32`` hold all weights so. ``mixed`` holds the matrices that autocast would round to bfloat16
    at every use in bfloat16 from the start, which gives the same products, and everything else in float32: embedding,
    norms and so the residual stream. It runs under autocast only.

    Args:
        num_shards: ranks over which FSDP2 shards the weights as they are read, all of the default process group.

    Raises:
        ValueError: ``mixed`` weights cannot be sharded.
    """
    quiet_loading()
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    if num_shards > 1:
        if precision == "mixed":
            raise ValueError("weights in mixed precision cannot be sharded; use float32 or bfloat16")
        sharded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, distributed_config=DistributedConfig(fsdp_size=num_shards)
        )
        return sharded
    where = device()
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, device_map=placement(where)
    )
    if precision == "mixed":
        for part in model.modules():
            if isinstance(part, torch.nn.Linear):
                # A parameter of its own: a head that is tied to the embedding parts from it here.
                part.weight = torch.nn.Parameter(part.weight.detach().bfloat16(), requires_grad=False)
    loaded: PreTrainedModel = model.to(where)
    return loaded


def placement(where: torch.device) -> dict[str, torch.device] | None:
    """``from_pretrained``'s ``device_map``: each matrix goes to the GPU as it is read.

    Otherwise every rank of a node held the model in the node's memory first. DeepSpeed places the parts of ZeRO-3 itself.
    """
    return None if where.type == "cpu" or is_deepspeed_zero3_enabled() else {"": where}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``; one without a padding token pads with its end-of-text token."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    # What is tokenised past transformers must not be cut or padded as the file says.
    backend: Any = tokenizer
    backend.backend_tokenizer.no_truncation()
    backend.backend_tokenizer.no_padding()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
