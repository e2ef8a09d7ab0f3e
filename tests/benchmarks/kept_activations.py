"""What compiled layers keep for the backward pass: ``python -m tests.benchmarks.kept_activations``.

Bytes of each token that a layer in the proportions of Llama 3.1 8B keeps, an eighth as wide, with adapters as PEFT multiplies
them and joined with their matrices. On a processor: what is kept is decided before code for a device is made.
"""

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from transformers import AutoModelForCausalLM, LlamaConfig

from tasks.models.joined_lora import join
from tasks.models.packed_attention import PACKED, end_to_end, register
from tasks.training.packed_trainer import compile_layers

NUM_TOKENS = 512
NUM_LAYERS = 3
SIZES = {
    "vocab_size": 64,
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
}


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


def main() -> None:
    register()
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).to(torch.bfloat16)
    base.set_attn_implementation(PACKED)
    peft = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    joined = copy.deepcopy(peft)
    batch = end_to_end(torch.arange(NUM_TOKENS)[None] % SIZES["vocab_size"], (NUM_TOKENS,))
    with torch.no_grad():
        products = join(joined, lambda: joined(**batch, use_cache=False))
    assert products is not None
    products.refresh()
    found = {}
    for name, model in (("PEFT's", peft), ("joined", joined)):
        compile_layers(model.get_base_model())
        found[name] = kept_bytes(model, batch) / NUM_TOKENS / NUM_LAYERS
    for name, num_bytes in found.items():
        share = num_bytes / found["PEFT's"]
        print(f"{name:8} {num_bytes:8,.0f} bytes a token and layer, {share:.2f} times PEFT's")


if __name__ == "__main__":
    main()
