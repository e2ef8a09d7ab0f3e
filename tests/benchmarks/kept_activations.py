"""What compiled layers keep for the backward pass: ``python -m tests.benchmarks.kept_activations``.

Bytes of each token that a layer keeps, an eighth as wide as those of 8B parameters, with adapters as PEFT multiplies them and
joined with their matrices. On a processor: what is kept is decided before code for a device is made.
"""

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from tasks.models.joined_lora import join
from tasks.models.packed_attention import PACKED, end_to_end, register
from tasks.training.packed_trainer import compile_layers

NUM_TOKENS = 512
NUM_LAYERS = 3
SIZES = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": NUM_LAYERS}
SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "as Llama 3.1 8B": (LlamaConfig, {"num_attention_heads": 4, "num_key_value_heads": 1}),
    "a head for each key": (LlamaConfig, {"num_attention_heads": 4, "num_key_value_heads": 4}),
    "attention wider than the layer": (
        Qwen3Config,
        {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128},
    ),
}
TARGETS: tuple[str | list[str], ...] = ("all-linear", ["q_proj", "v_proj"])


def kept_bytes(model: Any, batch: dict[str, Any]) -> int:
    """Of all storages that the decoder's forward pass keeps, those of parameters and blocks aside."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage()._cdata) not in weights:
            kept[storage] = tensor
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16)
    with autocast, disable_input_dtype_casting(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = model.get_base_model().get_decoder()(**batch, use_cache=False)
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def compared(shape: str, targets: str | list[str], backend: str = "inductor") -> dict[str, float]:
    """Bytes of each token and layer, with PEFT's products and joined."""
    register()
    torch.manual_seed(0)
    kind, sizes = SHAPES[shape]
    base = AutoModelForCausalLM.from_config(kind(**SIZES | sizes)).to(torch.bfloat16)
    base.set_attn_implementation(PACKED)
    peft = get_peft_model(base, LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"))
    joined = copy.deepcopy(peft)
    batch = end_to_end(torch.arange(NUM_TOKENS)[None] % SIZES["vocab_size"], (NUM_TOKENS,))
    with torch.no_grad():
        products = join(joined, lambda: joined(**batch, use_cache=False))
    assert products is not None
    products.refresh()
    found = {}
    for name, model in (("PEFT's", peft), ("joined", joined)):
        compile_layers(model.get_base_model(), backend)
        found[name] = kept_bytes(model, batch) / NUM_TOKENS / NUM_LAYERS
    return found


def main() -> None:
    for shape in SHAPES:
        for targets in TARGETS:
            found = compared(shape, targets)
            theirs, ours = found["PEFT's"], found["joined"]
            adapted = targets if isinstance(targets, str) else ", ".join(targets)
            print(
                f"{shape}, {adapted}: PEFT's {theirs:,.0f}, joined {ours:,.0f}, {ours / theirs:.3f} times", flush=True
            )


if __name__ == "__main__":
    main()
