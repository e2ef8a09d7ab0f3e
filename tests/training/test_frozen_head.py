"""The loss behind a frozen head must be cross-entropy's, and so must its gradient."""

import peft
import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy, linear

from tasks.training import frozen_head
from tasks.training.frozen_head import frozen_head_loss, is_plain_product
from tests.training.toy import SIZES


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 64])
def test_loss_and_gradient_are_cross_entropys_however_the_tokens_are_cut(num_tokens, monkeypatch):
    monkeypatch.setattr(frozen_head, "TOKENS_AT_A_TIME", 16)
    torch.manual_seed(0)
    weight, targets = torch.randn(50, 8), torch.randint(0, 50, (num_tokens,))
    ours = torch.randn(num_tokens, 8, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    (frozen_head_loss(ours, weight, targets) * 3).backward()
    (cross_entropy(linear(theirs, weight), targets, reduction="sum") * 3).backward()
    torch.testing.assert_close(frozen_head_loss(ours, weight, targets),
                               cross_entropy(linear(theirs, weight), targets, reduction="sum"))  # fmt: skip
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.gpu
# Shown, and no errors: torch's compiler warns of itself wherever it traces.
@pytest.mark.filterwarnings("default")
def test_compiled_chunks_whole_and_not_are_cross_entropy():
    torch.manual_seed(0)
    num_tokens = 2 * frozen_head.TOKENS_AT_A_TIME + 5
    weight, targets = torch.randn(500, 64).cuda(), torch.randint(0, 500, (num_tokens,)).cuda()
    ours = torch.randn(num_tokens, 64).cuda().requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    losses = frozen_head_loss(ours, weight, targets), cross_entropy(linear(theirs, weight), targets, reduction="sum")
    for loss in losses:
        loss.backward()
    # Thousands of losses, summed in another order.
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-3, rtol=1e-3)


def test_the_head_itself_gets_no_gradient():
    weight = torch.randn(50, 8, requires_grad=True)
    frozen_head_loss(torch.randn(4, 8, requires_grad=True), weight, torch.tensor([1, 2, 3, 4])).backward()
    assert weight.grad is None


@pytest.mark.parametrize(
    ("config", "is_plain"),
    [
        (transformers.LlamaConfig(**SIZES), True),
        (transformers.CohereConfig(**SIZES, logit_scale=0.0625), True),
        (transformers.Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=30.0), False),
        (transformers.Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=None), True),
        (transformers.PhiConfig(**SIZES), False),
    ],
    ids=["llama", "cohere's factor", "gemma 2's cap", "gemma 2 without", "phi's bias"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_is_more_than_a_product_is_noticed(config, is_plain, dtype):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    head, attention = model.get_output_embeddings(), model.config._attn_implementation
    assert is_plain_product(model) is is_plain
    assert model.get_output_embeddings() is head
    assert model.training
    assert model.config._attn_implementation == attention


# PEFT asks for it by the old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_head_with_an_adapter_is_no_plain_product():
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
    assert not is_plain_product(adapted.get_base_model())
