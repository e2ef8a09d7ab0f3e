"""Loads a materialised model for the device at hand."""

import os
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


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


def load_model(folder: Path, precision: Literal["float32", "bfloat16"]) -> PreTrainedModel:
    """The causal language model in ``folder`` on this rank's device, in the precision of the settings."""
    quiet_loading()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, precision), use_safetensors=True)
    loaded: PreTrainedModel = model.to(device())
    return loaded


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``; one without a padding token pads with its end-of-text token."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
