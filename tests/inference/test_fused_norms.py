"""Torch's own norm takes the place of a model's where it computes the same, and only there."""

import pytest
import torch
import transformers

from tasks.inference.fused_norms import fuse_norms

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
IDS = torch.arange(12)[None]


def made(name, dtype=torch.float32):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**SHAPE)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.5, 0.2)
    return model.to(dtype)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "count"), [("LlamaConfig", 5), ("MistralConfig", 5), ("Qwen2Config", 5), ("Qwen3Config", 9)]
)
def test_a_fused_norm_changes_no_answer(name, count):
    model = made(name)
    before = model(IDS).logits
    assert fuse_norms(model) == count
    assert sum(isinstance(part, torch.nn.RMSNorm) for part in model.modules()) == count
    torch.testing.assert_close(model(IDS).logits, before)


@torch.inference_mode()
def test_in_bfloat16_it_is_nearer_to_the_exact_result():
    exact, plain, fused = made("LlamaConfig"), made("LlamaConfig", torch.bfloat16), made("LlamaConfig", torch.bfloat16)
    assert fuse_norms(fused) == 5
    x = torch.randn(1, 50, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(1)).bfloat16()
    weight = fused.model.norm.weight.float()
    exact.model.norm.weight.data = weight
    wanted = exact.model.norm(x.float())
    errors = [(model.model.norm(x).float() - wanted).norm() for model in (plain, fused)]
    assert errors[1] < errors[0]


@torch.inference_mode()
def test_a_norm_that_takes_the_mean_off_stays():
    config = transformers.CohereConfig(**SHAPE, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert any(hasattr(part, "variance_epsilon") for part in model.modules())
    assert fuse_norms(model) == 0


class Gated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = torch.nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x, gate=None):
        x = x if gate is None else x * gate
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def test_a_norm_that_takes_more_than_its_input_stays():
    model = torch.nn.Sequential(Gated())
    assert fuse_norms(model) == 0


@torch.inference_mode()
def test_a_norm_of_another_formula_stays():
    """Gemma's adds one to its weight."""
    model = made("GemmaConfig")
    for part in model.modules():
        if "RMSNorm" in type(part).__name__:
            part.variance_epsilon = part.eps
    before = model(IDS).logits
    assert fuse_norms(model) == 0
    assert torch.equal(model(IDS).logits, before)
