"""A matrix and its adapter in one product: what PEFT computes, its gradients, its parameters."""

import copy
from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from tasks.models.joined_lora import JoinedLinear, join
from tests.benchmarks.kept_activations import compared

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.arange(24).reshape(2, 12)


def adapted(kind: type = Qwen2Config, base: Mapping[str, Any] = MappingProxyType({}), **changes: Any) -> Any:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(kind(**SIZES | base))
    lora = {"r": 8, "lora_alpha": 24, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes
    model = get_peft_model(made, LoraConfig(**lora))
    for name, parameter in model.named_parameters():
        # Zeros at first, of an adapter's second factor and of biases: nothing would be seen of them.
        if "lora_B" in name or "bias" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def joined(model: Any) -> Any:
    return join(model, lambda: model(input_ids=IDS, use_cache=False))


def pass_through(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradients of all adapters in one."""
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.square().mean().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def assert_same(one: Any, other: Any) -> None:
    for ours, theirs in zip(pass_through(one), pass_through(other), strict=True):
        assert theirs.norm() > 0
        assert (ours - theirs).norm() < 2e-5 * theirs.norm()


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("inner", [48, 96])
def test_outputs_and_gradients_are_pefts_from_step_to_step(kind, recomputed, inner):
    theirs = adapted(kind, base={"intermediate_size": inner})
    ours = copy.deepcopy(theirs)
    products = joined(ours)
    # Query, key and value; what follows attention; gate and up; down.
    assert (products.num_layers, products.num_products) == (3 * 7, 3 * 4)
    if recomputed:
        ours.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    for _ in range(3):
        products.refresh()
        assert_same(ours, theirs)
        with torch.no_grad():
            for model in (ours, theirs):
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter -= 0.5 * parameter.grad / parameter.grad.norm()
    # The steps are such that yesterday's weights would be seen.
    before = pass_through(ours)[0]
    products.refresh()
    assert (pass_through(ours)[0] - before).norm() > 0.01 * before.norm()


def by_fused_adamw(model):
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True).step()


def by_plain_adamw(model):
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=False, foreach=False).step()


def by_loading_a_checkpoint(model):
    set_peft_model_state_dict(model, {name: 2 * tensor for name, tensor in get_peft_model_state_dict(model).items()})


@pytest.mark.parametrize("change", [by_fused_adamw, by_plain_adamw, by_loading_a_checkpoint])
def test_weights_are_taken_however_they_changed(change):
    theirs = adapted()
    ours = copy.deepcopy(theirs)
    products = joined(ours)
    products.refresh()
    assert_same(ours, theirs)
    # Of a gradient that is zero but for rounding AdamW keeps the sign.
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        mine.grad = None if other.grad is None else other.grad.clone()
    for model in (ours, theirs):
        change(model)
    products.refresh()
    assert_same(ours, theirs)


def test_parameters_stay_pefts_and_no_matrix_is_held_twice():
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = sum(p.numel() for p in model.parameters())
    joined(model).refresh()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() // 4 for p in model.parameters()}
    blocks = {m.block.matrix.untyped_storage()._cdata for m in model.modules() if isinstance(m, JoinedLinear)}
    # Each block is the storage of its matrices; beyond them it has room for a copy of the adapters, and its zeros.
    assert blocks <= set(storages)
    assert held < sum(storages.values()) < 1.6 * held


def test_adapters_that_are_switched_off_and_a_layer_that_is_asked_again():
    theirs = adapted()
    ours = copy.deepcopy(theirs)
    joined(ours).refresh()
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.allclose(ours(IDS).logits, theirs(IDS).logits, atol=1e-6)
    ours_k, theirs_k = (m.get_base_model().get_decoder().layers[0].self_attn.k_proj for m in (ours, theirs))
    hidden = torch.randn(3, SIZES["hidden_size"])
    for _ in range(2):
        assert torch.allclose(ours_k(hidden), theirs_k(hidden), atol=1e-5)


def test_some_layers_only():
    theirs = adapted(target_modules=["q_proj", "v_proj", "down_proj"], layers_to_transform=[1, 2])
    ours = copy.deepcopy(theirs)
    products = joined(ours)
    assert (products.num_layers, products.num_products) == (6, 4)
    products.refresh()
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "changes",
    [{"lora_dropout": 0.1}, {"r": 6}, {"use_dora": True}, {"lora_bias": True, "target_modules": ["k_proj"]}],
)
def test_what_is_no_plain_adapter_stays_pefts(changes):
    model = adapted(**changes)
    assert joined(model) is None
    assert not any(isinstance(module, JoinedLinear) for module in model.modules())


def test_a_layer_that_is_used_twice_in_a_pass_or_never_stays_pefts():
    model = adapted()
    first, second, _ = model.get_base_model().get_decoder().layers
    first.mlp.up_proj = first.mlp.gate_proj
    second.self_attn.forward = lambda hidden_states, **_: (0 * hidden_states, None)
    theirs = copy.deepcopy(model)
    products = joined(model)
    assert (products.num_layers, products.num_products) == (5 + 3 + 7, 3 + 2 + 4)
    assert type(first.mlp.gate_proj) is type(second.self_attn.q_proj) is not JoinedLinear
    products.refresh()
    assert torch.allclose(model(IDS).logits, theirs(IDS).logits, atol=1e-6)


def test_in_bfloat16_as_in_training_what_differs_is_rounding():
    exact = adapted()
    theirs = copy.deepcopy(exact)
    for name, parameter in theirs.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.to(torch.bfloat16)
    ours = copy.deepcopy(theirs)
    with torch.autocast("cpu", torch.bfloat16):
        joined(ours).refresh()
        found = {name: pass_through(m) for name, m in (("ours", ours), ("theirs", theirs))}
    found["exact"] = pass_through(exact)
    for ours_, theirs_, exact_ in zip(found["ours"], found["theirs"], found["exact"], strict=True):
        # As far from what is exact as PEFT's is.
        assert (ours_ - exact_).norm() < 1.5 * (theirs_ - exact_).norm() < 0.1 * exact_.norm()


def test_nothing_is_held_after_a_pass_and_what_was_not_asked_for_is_forgotten():
    model = adapted()
    products = joined(model)
    products.refresh()
    pass_through(model)
    blocks = [m.block for m in model.modules() if isinstance(m, JoinedLinear)]
    assert all(block._given is None and not any(w is not None for w in block._waiting) for block in blocks)
    attention = model.get_base_model().get_decoder().layers[0].self_attn
    hidden = torch.randn(3, SIZES["hidden_size"])
    attention.q_proj(hidden)
    before = attention.k_proj.block._waiting[1]
    with torch.no_grad():
        attention.k_proj.lora_B["default"].weight += 1
    products.refresh()
    products.forget()
    assert (attention.k_proj(hidden) - before).abs().max() > 0.1


@pytest.mark.parametrize(
    ("shape", "targets", "most"),
    [
        ("as Llama 3.1 8B", "all-linear", 1.0),
        ("a head for each key", ["q_proj", "v_proj"], 1.0),
        # Its queries are normalised, which keeps them as they were, and with them the keys' and values' part.
        ("attention wider than the layer", "all-linear", 1.04),
    ],
)
# Shown, and no errors: torch's compiler warns of itself wherever it traces.
@pytest.mark.filterwarnings("default")
def test_compiled_layers_keep_no_more_than_with_pefts_products(shape, targets, most):
    torch._dynamo.reset()
    found = compared(shape, targets, "aot_eager_decomp_partition")
    torch._dynamo.reset()
    assert found["joined"] <= most * found["PEFT's"]


def test_what_follows_attention_takes_its_input_as_it_is_whatever_its_shape():
    model = adapted(Qwen3Config, base={"head_dim": 32})
    products = joined(model)
    assert (products.num_layers, products.num_products) == (3 * 7, 3 * 4)
    blocks = {name.rsplit(".")[-1]: m.block for name, m in model.named_modules() if isinstance(m, JoinedLinear)}
    assert [name for name, block in blocks.items() if not block.is_inside_forward] == ["o_proj"]


@pytest.mark.parametrize(
    ("inner", "targets", "found"),
    [
        (96, "all-linear", {"gate_proj", "up_proj"}),
        (160, ["up_proj", "down_proj"], {"up_proj"}),
        (64, "all-linear", set()),
    ],
)
def test_where_gradients_are_much_wider_than_inputs_they_are_read_once_less(inner, targets, found):
    theirs = adapted(base={"intermediate_size": inner}, target_modules=targets)
    ours = copy.deepcopy(theirs)
    joined(ours).refresh()
    blocks = {name.rsplit(".")[-1]: m.block for name, m in ours.named_modules() if isinstance(m, JoinedLinear)}
    assert {name for name, block in blocks.items() if not block.is_inside_backward} == found
    assert_same(ours, theirs)


@pytest.mark.filterwarnings("default")
def test_an_input_that_needs_no_gradient_is_given_none():
    """Gate and up of a first layer alone: compiled, the product with their matrices is left out."""
    flops = []
    for needs_gradient in (True, False):
        torch._dynamo.reset()
        model = adapted(base={"num_hidden_layers": 1}, target_modules=["gate_proj", "up_proj"])
        joined(model).refresh()
        mlp = model.get_base_model().get_decoder().layers[0].mlp
        together = torch.compile(
            lambda x, mlp=mlp: mlp.gate_proj(x) + mlp.up_proj(x), backend="aot_eager_decomp_partition"
        )
        output = together(torch.randn(32, SIZES["hidden_size"], requires_grad=needs_gradient))
        with FlopCounterMode(display=False) as counted:
            output.square().mean().backward()
        flops.append(counted.get_total_flops())
    torch._dynamo.reset()
    assert 0 < flops[1] < 0.5 * flops[0]


def test_a_configuration_that_does_not_speak_of_attention_is_no_hindrance(monkeypatch):
    theirs = adapted()
    ours = copy.deepcopy(theirs)
    monkeypatch.setattr(
        Qwen2Config, "get_text_config", lambda self, **_: SimpleNamespace(num_attention_heads=[4, 4, 4])
    )
    products = joined(ours)
    monkeypatch.undo()
    assert (products.num_layers, products.num_products) == (3 * 7, 3 * 4)
    products.refresh()
    assert_same(ours, theirs)


def test_each_of_several_precisions_is_a_block():
    model = adapted()
    decoder = model.get_base_model().get_decoder()
    for layer in decoder.layers:
        layer.self_attn.k_proj.base_layer.to(torch.bfloat16)
    theirs = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        products = joined(model)
        products.refresh()
        passes = [pass_through(m) for m in (model, theirs)]
    assert (products.num_layers, products.num_products) == (3 * 7, 3 * 5)
    for ours, others in zip(*passes, strict=True):
        assert (ours - others).norm() < 0.05 * others.norm()
    assert {m.block.matrix.dtype for m in model.modules() if isinstance(m, JoinedLinear)} == {
        torch.float32,
        torch.bfloat16,
    }
