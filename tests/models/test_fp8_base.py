"""FP8 products beside exact ones. All of it runs on a processor too."""

import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tasks.models import fp8_base
from tasks.models.fp8_base import Fp8Linear, checksum, convert, share_in_fp8, to_fp8, why_not

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
E4M3_ROUNDING = 2.0**-4
"""Three bits after the point: an element is off by at most a sixteenth of itself."""


def distance(found, expected):
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.fixture
def pair():
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=True).bfloat16().requires_grad_(False)
    return linear, Fp8Linear(linear)


def test_each_row_keeps_its_own_scale():
    rows = torch.randn(5, 64)
    rows[1] *= 1e4
    rows[2] *= 1e-6
    rows[3] = 0
    quantised, scales = to_fp8(rows)
    back = quantised.float() * scales
    for row in (0, 1, 2, 4):
        assert distance(back[row], rows[row]) < 0.04
        assert ((back[row] - rows[row]).abs() <= E4M3_ROUNDING * rows[row].abs() + scales[row] * 2**-9).all()
    assert not back[3].any()
    assert quantised.float().abs().amax(1)[[0, 1, 2, 4]].tolist() == [448.0] * 4


def test_product_and_gradient_are_near_the_exact_ones(pair):
    linear, fp8 = pair
    given = torch.randn(2, 7, 64, dtype=torch.bfloat16)
    given[0, 3] *= 1000
    gradient = torch.randn(2, 7, 48, dtype=torch.bfloat16)
    results = []
    for module in (linear, fp8):
        leaf = given.clone().requires_grad_()
        output = module(leaf)
        output.backward(gradient)
        results.append((output.detach(), leaf.grad))
    (exact, exact_gradient), (near, near_gradient) = results
    assert near.dtype == torch.bfloat16
    assert near.shape == exact.shape
    # The token that is a thousand times larger takes nothing from the others.
    ordinary = torch.tensor([i for i in range(14) if i != 3])
    for found, expected in ((near, exact), (near_gradient, exact_gradient)):
        assert 1e-4 < distance(found.flatten(0, 1)[ordinary], expected.flatten(0, 1)[ordinary]) < 0.06


def test_what_is_no_number_stays_none(pair):
    given = torch.randn(3, 64, dtype=torch.bfloat16)
    given[1, 5] = float("nan")
    output = pair[1](given)
    assert output[1].isnan().all()
    assert not output[[0, 2]].isnan().any()


def test_only_frozen_matrices_of_the_decoder_are_converted_and_those_that_fit():
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=72, num_hidden_layers=2, num_attention_heads=2
    )
    model = get_peft_model(
        LlamaForCausalLM(config).bfloat16(),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    names = {name for name, _ in model.named_parameters() if "lora_" in name}
    # 72 is not divisible by 16: gate, up and down stay.
    decoder = model.get_base_model().get_decoder()
    assert convert(decoder) == 8
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names
    assert sum(isinstance(part, Fp8Linear) for part in model.modules()) == 8
    assert isinstance(model.get_base_model().lm_head, nn.Linear)
    assert not [name for name in model.state_dict() if "row" in name or "column" in name]
    before = checksum(decoder)
    first = next(part for part in decoder.modules() if isinstance(part, Fp8Linear))
    first.rows.view(torch.uint8)[0, 0] += 1
    assert checksum(decoder) != before


def test_each_old_matrix_is_gone_before_the_next_is_converted(monkeypatch):
    decoder = nn.Sequential(*(nn.Linear(32, 32).requires_grad_(False) for _ in range(4)))
    old, alive = [weakref.ref(layer.weight) for layer in decoder], []

    class Watching(Fp8Linear):
        def __init__(self, linear):
            alive.append(sum(reference() is not None for reference in old))
            super().__init__(linear)

    monkeypatch.setattr(fp8_base, "Fp8Linear", Watching)
    assert convert(decoder) == 4
    assert alive == [4, 3, 2, 1]


def test_the_share_that_would_be_in_fp8_is_known_without_weights():
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.device("meta"):
        dense = LlamaForCausalLM(LlamaConfig(intermediate_size=64, **sizes))
        experts = Qwen3MoeForCausalLM(Qwen3MoeConfig(moe_intermediate_size=64, num_experts=8, head_dim=16, **sizes))
    assert share_in_fp8(dense.get_decoder()) > 0.98
    assert share_in_fp8(experts.get_decoder()) < 0.3


def test_a_gpu_without_fp8_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    assert why_not(torch.device("cuda")) == "NVIDIA A100 has compute capability 8.0, and FP8 products need 8.9"
    assert why_not(torch.device("cpu")) is None
