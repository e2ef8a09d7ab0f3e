"""The count that MFU is made of, against the reference's for Llama 3.1 8B: 34.2 GFLOP a token at 4,096 tokens."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.training.useful_work import flops_per_token

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
PARTS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(num_layers: int, **lora):
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=num_layers, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        return get_peft_model(
            model, LoraConfig(r=64, task_type="CAUSAL_LM", **({"target_modules": "all-linear"} | lora))
        )


def test_llama_8b_takes_what_the_reference_counts():
    assert flops_per_token(llama(32), [4096]) == pytest.approx(34.2e9, rel=0.01)


def test_layers_below_the_first_adapter_have_no_backward_pass_and_long_rows_weigh_by_their_tokens():
    all_layers = flops_per_token(llama(4), [1000])
    upper = flops_per_token(llama(4, target_modules=PARTS, layers_to_transform=[2, 3]), [1000])
    one_layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    adapter = 64 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    attention = 6 * 1000 * 4096
    assert all_layers - upper == pytest.approx(2 * (2 * one_layer + 6 * adapter + attention * 2 / 3))
    assert flops_per_token(llama(4), [1000, 1]) == pytest.approx(all_layers, rel=1e-3)


def test_a_head_with_an_adapter_is_counted_once_and_its_adapter_beside_it():
    without, with_adapter = (flops_per_token(llama(2, target_modules=p), [1000]) for p in (PARTS, [*PARTS, "lm_head"]))
    assert with_adapter - without == pytest.approx(6 * 64 * (4096 + 128256))
