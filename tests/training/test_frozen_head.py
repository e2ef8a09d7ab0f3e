"""The loss behind a frozen head must be cross-entropy's, and so must its gradient."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from tasks.training import frozen_head
from tasks.training.frozen_head import frozen_head_loss


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


def test_the_head_itself_gets_no_gradient():
    weight = torch.randn(50, 8, requires_grad=True)
    frozen_head_loss(torch.randn(4, 8, requires_grad=True), weight, torch.tensor([1, 2, 3, 4])).backward()
    assert weight.grad is None
