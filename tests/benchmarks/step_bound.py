"""What a training step cannot be faster than on this chip: ``python -m tests.benchmarks.step_bound``.

The matrix products of a step of Llama 3.1 8B's shape, and its attention, forward and backward, one after the other with
nothing between them and over and over until the chip is warm: in its first moments it is faster than it can go on. Products
that nobody has made faster than torch's are what bounds a step here; other passes over memory are left out.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tasks.training.packed_trainer import ATTENTION_KERNELS
from tests.benchmarks.llama_8b import SHAPE

LONGEST = 4096
STEP_TOKENS = 16_384
HEAD_PARTS = 8
"""The head is multiplied with an eighth of the tokens at a time."""
WIDTH, INNER, LAYERS = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["num_hidden_layers"]
HEADS, KEYS = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
HEAD_SIZE = WIDTH // HEADS
BLOCKS: tuple[tuple[int, tuple[int, ...]], ...] = (
    (WIDTH, (WIDTH, KEYS * HEAD_SIZE, KEYS * HEAD_SIZE)),
    (WIDTH, (WIDTH,)),
    (WIDTH, (INNER, INNER)),
    (INNER, (WIDTH,)),
)
"""Of a layer: the width of an input, and the widths of what is made of it."""


@dataclass(frozen=True)
class Bound:
    """Seconds of :data:`STEP_TOKENS` tokens in documents of :data:`LONGEST`, on a warm chip.

    Attributes:
        products_s: of the frozen matrices with what goes forward and back, the head's too.
        with_adapters_s: the same with LoRA's: what it adds to the sides of its matrix, nothing that is multiplied by zero, and
            the thin ones by themselves.
        attention_s: forward and backward.
    """

    products_s: float
    with_adapters_s: float
    attention_s: float

    def __str__(self) -> str:
        parts = {
            "products with the base": self.products_s,
            "these and attention": self.products_s + self.attention_s,
            "these and the adapters' products": self.with_adapters_s + self.attention_s,
        }
        return "\n".join(
            f"{name:32} {1000 * seconds:6.0f} ms, at most {STEP_TOKENS / seconds:7,.0f} tokens/s"
            for name, seconds in parts.items()
        )


def measure(rank: int, seconds: float = 12.0) -> Bound:
    """Time each of the three for so many seconds, adapters of rank ``rank``."""
    head = _head()
    return Bound(
        products_s=_warm(_multiply(_of_base(), head), seconds),
        with_adapters_s=_warm(_multiply(_with_adapters(rank), head), seconds),
        attention_s=_warm(_attend(), seconds),
    )


Product = tuple[torch.Tensor, torch.Tensor]


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def _of_base() -> list[Product]:
    """Of one layer, each of its matrices by itself."""
    products = []
    for width, outputs in BLOCKS:
        for height in outputs:
            weight = _random(height, width) * 0.02
            products += [(_random(STEP_TOKENS, width), weight.t()), (_random(STEP_TOKENS, height), weight)]
    return products


def _with_adapters(rank: int) -> list[Product]:
    """Of one layer, so as an adapter costs least, and nothing is multiplied by zero.

    Forward ``[x, xA'] [W, sB]'`` for each matrix, back ``[g, gsB] [W; A]`` for all of an input, and the thin ones; ``xA'`` is of
    all adapters of an input at once. Where g is much wider than x, ``g [W, sB]`` for each matrix instead, and ``(gsB) A``.
    """
    products = []
    for width, outputs in BLOCKS:
        height, ranks = sum(outputs), rank * len(outputs)
        given, narrow = _random(STEP_TOKENS, width), _random(STEP_TOKENS, rank)
        upper, lower = _random(height, width) * 0.02, _random(ranks, width) * 0.02
        is_inside = height <= 2 * width
        products += [(given, lower.t()), (_random(STEP_TOKENS, ranks).t(), given)]
        for one in outputs:
            gradient, side = _random(STEP_TOKENS, one), _random(one, width + rank) * 0.02
            products += [(_random(STEP_TOKENS, width + rank), side.t()), (gradient.t(), narrow)]
            products.append((gradient, side[:, width:] if is_inside else side))
        if is_inside:
            products.append((_random(STEP_TOKENS, height + ranks), torch.cat([upper, lower])))
        else:
            products.append((_random(STEP_TOKENS, ranks), lower))
    return products


def _head() -> list[Product]:
    head, tokens = _random(SHAPE["vocab_size"], WIDTH) * 0.02, STEP_TOKENS // HEAD_PARTS
    return [(_random(tokens, WIDTH), head.t()), (_random(tokens, SHAPE["vocab_size"]), head)]


def _multiply(of_layer: Sequence[Product], of_head: Sequence[Product]) -> Callable[[], None]:
    def work() -> None:
        for left, right in [*of_layer] * LAYERS + [*of_head] * HEAD_PARTS:
            torch.mm(left, right)

    return work


def _attend() -> Callable[[], None]:
    query, key, value = (
        _random(STEP_TOKENS // LONGEST, heads, LONGEST, HEAD_SIZE).requires_grad_() for heads in (HEADS, KEYS, KEYS)
    )
    upstream = torch.randn_like(query)

    def work() -> None:
        with sdpa_kernel(ATTENTION_KERNELS, set_priority=True):
            for _ in range(LAYERS):
                scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).backward(upstream)

    return work


def _warm(work: Callable[[], None], seconds: float) -> float:
    """The median's seconds over the second half of the time."""
    times, began = [], time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[len(times) // 2 :])


if __name__ == "__main__":
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, adapters of rank 64")
    print(measure(64))
