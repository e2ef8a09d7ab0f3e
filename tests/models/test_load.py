"""Where weights go as they are read."""

import torch

from tasks.models import load
from tasks.models.load import placement

GPU = torch.device("cuda", 1)


def test_weights_go_straight_to_this_ranks_gpu():
    assert placement(GPU) == {"": GPU}
    assert placement(torch.device("cpu")) is None


def test_deepspeed_places_its_parts_itself(monkeypatch):
    """transformers refuses to be told where they go."""
    monkeypatch.setattr(load, "is_deepspeed_zero3_enabled", lambda: True)
    assert placement(GPU) is None
