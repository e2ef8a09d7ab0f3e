"""Frozen matrices multiplied in FP8 (e4m3), twice as fast on a GPU as in bfloat16; what is trained stays as it is.

Each row of a matrix has a scale of its own, and so has each token of what it is multiplied with, found anew at every use: a
token far larger than the others costs the others nothing. The gradient of the input multiplies with the matrix the other way
round, so that it is kept a second time with a scale for each of its columns; two bytes a parameter together, as in bfloat16.
"""

from typing import Any

import torch
from torch import nn

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
DIVISOR = 16
"""The product's kernels want both sides of a matrix divisible by it."""
MIN_CAPABILITY = (8, 9)
"""Ada, Hopper and later."""


def why_not(device: torch.device) -> str | None:
    """What keeps FP8 products from running there; None: nothing. On a processor they run, slower than any other."""
    if device.type != "cuda" or (capability := torch.cuda.get_device_capability(device)) >= MIN_CAPABILITY:
        return None
    found, needed = (".".join(map(str, version)) for version in (capability, MIN_CAPABILITY))
    return f"{torch.cuda.get_device_name(device)} has compute capability {found}, and FP8 products need {needed}"


def to_fp8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (R, C) in FP8, and their scales (R, 1) in float32: the largest element of each row becomes the largest FP8."""
    # CUDA's product takes the left side row by row and the right one column by column, and nothing else.
    exact = rows.contiguous().float()
    scales = exact.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    return (exact / scales).to(FP8), scales


class Fp8Linear(nn.Module):
    """A frozen :class:`~torch.nn.Linear` whose products are FP8, returned in bfloat16.

    Sums are Hopper's fast ones, of a few bits less than float32, forward and for the gradient.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        weight = linear.weight.detach()
        for name, tensor in zip(
            ("rows", "row_scales", "columns", "column_scales"), (*to_fp8(weight), *to_fp8(weight.t())), strict=True
        ):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features), in bfloat16."""
        product: torch.Tensor = _Product.apply(
            given.reshape(-1, self.in_features), self.rows, self.row_scales, self.columns, self.column_scales
        )
        product = product.reshape(*given.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {FP8}"


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        given: torch.Tensor,
        rows: torch.Tensor,
        row_scales: torch.Tensor,
        columns: torch.Tensor,
        column_scales: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(columns, column_scales)
        ctx.dtype = given.dtype
        return _multiply(given, rows, row_scales)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        columns, column_scales = ctx.saved_tensors
        return _multiply(gradients[0], columns, column_scales).to(ctx.dtype), None, None, None, None


def _multiply(given: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    quantised, given_scales = to_fp8(given)
    return torch._scaled_mm(
        quantised, rows.t(), scale_a=given_scales, scale_b=scales.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )


def fits(linear: nn.Linear) -> bool:
    """Whether the kernels take its products."""
    return not linear.in_features % DIVISOR and not linear.out_features % DIVISOR


def share_in_fp8(decoder: nn.Module) -> float:
    """Of a decoder's parameters, those that :func:`convert` would multiply in FP8; experts and other layers of their own are not.

    Args:
        decoder: without adapters, with weights or without.
    """
    converted: int = sum(p.weight.numel() for p in decoder.modules() if isinstance(p, nn.Linear) and fits(p))
    # The embedding is looked up and multiplies nothing.
    embeddings = {id(p.weight) for p in decoder.modules() if isinstance(p, nn.Embedding)}
    whole: int = sum(p.numel() for p in decoder.parameters() if id(p) not in embeddings)
    return converted / whole if whole else 0.0


def convert(decoder: nn.Module) -> int:
    """Put FP8 products in place of a decoder's frozen ones that :func:`fits`, those under an adapter too; says how many."""
    # Names, not layers: a list of layers would keep every old matrix until the end.
    places = [
        (parent, name)
        for parent in decoder.modules()
        for name, part in parent.named_children()
        if isinstance(part, nn.Linear) and not part.weight.requires_grad and fits(part)
    ]
    for parent, name in places:
        setattr(parent, name, Fp8Linear(getattr(parent, name)))
    return len(places)


def checksum(decoder: nn.Module) -> int:
    """Of all that is multiplied in FP8: the same on two ranks that hold the same."""
    return sum(
        int(part.rows.view(torch.uint8).sum(dtype=torch.int64)) * number
        for number, part in enumerate((p for p in decoder.modules() if isinstance(p, Fp8Linear)), start=1)
    )
