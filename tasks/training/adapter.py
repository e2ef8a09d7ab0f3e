"""The LoRA adapter: which layers get one, and how it is written when it is done."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from tasks.contracts.files import publish_folder, write_json
from tasks.contracts.settings import LoraSettings


def lora_config(lora: LoraSettings, model: PreTrainedModel) -> LoraConfig:
    """PEFT's configuration of the adapter.

    Args:
        model: with or without weights (on the meta device).

    Raises:
        ValueError: the model has no layer ``first_layer``, or a target names none of its layers.
    """
    layers = model.config.get_text_config().num_hidden_layers
    if lora.first_layer >= layers:
        raise ValueError(
            f"training.lora.first_layer={lora.first_layer}, but the model's {layers} layers end at {layers - 1}"
        )
    head = model.get_output_embeddings()
    linear = {name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and part is not head}
    available = sorted({name.rpartition(".")[2] for name in linear})
    target: str | list[str] = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    if isinstance(target, str) and target != "all-linear":
        # PEFT takes a string for a regular expression; the setting is a name.
        target = [target]
    if isinstance(target, list):
        names = [name for name, _ in model.named_modules()]
        # PEFT is content with one that matches, and trains less than was asked for.
        if unknown := [t for t in target if not any(name == t or name.endswith(f".{t}") for name in names)]:
            raise ValueError(
                f"training.lora.target_modules: {', '.join(unknown)} match no layer of the model; "
                f"its linear layers are {', '.join(available)}"
            )
    elif lora.first_layer:
        # PEFT takes its own "all-linear" together with all layers only.
        target = available
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=target,
        layers_to_transform=list(range(lora.first_layer, layers)) if lora.first_layer else None,
        task_type="CAUSAL_LM",
    )


def trained_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors by their names in the model: not the base's, which all ranks would have to gather."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_adapter(model: PeftModel, weights: Mapping[str, torch.Tensor], final: Path, base_digest: str) -> None:
    """Write the adapter as safetensors with the digest of its base, whole or not at all.

    Args:
        weights: whole, by their names in the model, of which this rank may hold parts.
    """
    temporary = final.with_name(".adapter.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(final, ignore_errors=True)
    model.save_pretrained(temporary, safe_serialization=True, state_dict=dict(weights))
    write_json(temporary / "manifest.json", {"base_weights_sha256": base_digest})
    publish_folder(temporary, final)
