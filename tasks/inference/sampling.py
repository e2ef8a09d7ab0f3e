"""Drawn answers that do not depend on what else is in a batch, nor on how many processes share the requests."""

import hashlib
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor


class SeededSampling(LogitsProcessor):
    """Makes the likeliest of the changed scores a draw from softmax(scores / temperature).

    Each request draws its own random numbers, from the seed and its id. Adding Gumbel noise and taking the highest is a draw from
    the distribution (Maddison et al. 2014, "A* Sampling"). Processors and GPUs draw different numbers from one seed.

    Args:
        request_ids: of the batch's rows, in order.
        temperature: above 0.
    """

    def __init__(self, request_ids: Sequence[str], temperature: float, seed: int, device: torch.device) -> None:
        self._temperature = temperature
        self._generators = [torch.Generator(device).manual_seed(seed_of(seed, name)) for name in request_ids]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores (rows, vocabulary) with the next draw's noise, in float32."""
        noise = torch.empty(scores.shape, device=scores.device)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        drawn: torch.FloatTensor = scores.float() / self._temperature - noise.log()
        return drawn


def seed_of(seed: int, request_id: str) -> int:
    """A request's own seed, below 2 ** 31: servers take no more everywhere."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{request_id}".encode()).digest()[:4], "big") >> 1
