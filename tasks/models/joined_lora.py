"""Frozen matrices and their LoRA adapters multiplied in one product, where PEFT adds two outputs of the layer's width.

What ``x W' + s (x A') B'`` takes beside its products is passes over memory. Here a matrix and its adapter are one block,

    | W  sB |
    | A   0 |

and layers that are given the same input (query, key and value; gate and up) are one block together. Its upper rows make
``[x, x A'] [W, sB]'`` of an input: the adapter's part is summed inside the product, and ``x A'`` is a product of its own, which
reads x once more. Its left columns make ``x [W; A]'``, both in one product, to whose larger part ``(x A') sB'`` is added: a pass
over what comes out instead. So does what follows attention: for the first way its input, which attention keeps, would have to be
copied and be kept twice. The gradient is ``[g, g sB] [W; A]`` or the larger part of ``g [W, sB]`` and ``(g sB) A``: the second
where g is much wider than what comes out, as gate's and up's. The modules, their parameters and their names stay PEFT's; a frozen
matrix becomes a view into its block.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

DIVISOR = 8
"""Of sides and ranks in bfloat16: products are fast where rows begin at multiples of 16 bytes."""
MANY_PARTS = 9
"""More than torch's compiler concatenates in one pass, in which every element looks which of them it is in
(``max_pointwise_cat_inputs`` of its configuration, 8): on an H200 that took 1.1 ms of a layer's 31 ms. Of more each is computed
in its place."""


class JoinedProducts:
    """The blocks of a model. Use :func:`join`."""

    def __init__(self, blocks: Sequence["_Block"]) -> None:
        self.num_products = len(blocks)
        self.num_layers = sum(len(block.layers) for block in blocks)
        self._blocks = blocks
        self._slots = [slot for block in blocks for slot in block.slots()]

    def refresh(self) -> None:
        """Take the adapters' present weights into the blocks, in the blocks' precision; whenever they changed.

        That they did does not show in them: torch's fused optimisers do not count what they write (``_version``).
        """
        slots_a, weights_a, slots_b, weights_b, scales = zip(*self._slots, strict=True)
        with torch.no_grad():
            torch._foreach_copy_(slots_a, weights_a)
            torch._foreach_copy_(slots_b, torch._foreach_mul(weights_b, scales))

    def forget(self) -> None:
        """Drop what was computed for layers that were not asked after all; before every forward pass."""
        for block in self._blocks:
            block.forget()


def join(model: Any, run: Callable[[], object]) -> JoinedProducts | None:
    """Join what can be joined of a decoder with adapters; None: nothing can.

    Args:
        model: a :class:`~peft.PeftModel` of a causal language model, on its device; a matrix in shards stays as it is.
        run: makes one forward pass of it, from which it is seen which layers are given the same input.
    """
    base = model.get_base_model()
    layers = [layer for layer in base.get_decoder().modules() if _can_be_joined(layer)]
    if not layers:
        return None
    after_attention, value_width = _attention(base.config.get_text_config())
    blocks = []
    for group in _by_input(layers, run):
        # By its shape, by which others may be taken for it: that is only a little slower.
        follows_attention = len(group) == 1 and (group[0].in_features, group[0].out_features) == after_attention
        blocks.append(_Block(group, value_width, is_input_kept=follows_attention))
    return JoinedProducts(blocks) if blocks else None


def _attention(text: Any) -> tuple[tuple[int, int] | None, int]:
    """Sides of the layer after attention, and width of its values; None and 0 where a model's configuration does not say."""
    heads, width = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
    # Some have a list with an entry for each layer.
    if not isinstance(heads, int) or not isinstance(width, int):
        return None, 0
    head_size = getattr(text, "head_dim", None) or width // heads
    return (heads * head_size, width), (getattr(text, "num_key_value_heads", None) or heads) * head_size


def _can_be_joined(layer: nn.Module) -> bool:
    if type(layer) is not Linear or type(layer.base_layer) is not nn.Linear:
        return False
    matrix = layer.base_layer.weight
    if matrix.requires_grad or isinstance(matrix, DTensor):
        return False
    if layer.merged or layer.lora_variant or layer.lora_bias.get(_only(layer.lora_A), True):
        return False
    name = _only(layer.lora_A)
    sides = (layer.in_features, layer.out_features, layer.r[name])
    return isinstance(layer.lora_dropout[name], nn.Identity) and not any(side % DIVISOR for side in sides)


def _only(adapters: nn.ModuleDict) -> str:
    (name,) = adapters
    return str(name)


def _by_input(layers: Sequence[Linear], run: Callable[[], object]) -> list[list[Linear]]:
    """Layers that are given one and the same tensor, together; without those that a pass uses several times, or never."""
    seen: list[tuple[torch.Tensor, list[Linear]]] = []

    def note(layer: Linear, given: tuple[torch.Tensor]) -> None:
        # The tensor is held, so that no other is taken for it.
        group = next((group for tensor, group in seen if tensor is given[0]), None)
        if group is None:
            seen.append((given[0], [layer]))
        else:
            group.append(layer)

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    uses = Counter(layer for _, group in seen for layer in group)
    once = [[layer for layer in group if uses[layer] == 1] for _, group in seen]
    # A block has one precision.
    precisions = {layer.base_layer.weight.dtype for layer in layers}
    alike = [[one for one in group if one.base_layer.weight.dtype == dtype] for group in once for dtype in precisions]
    return [group for group in alike if group]


class _Block:
    """Layers that are given the same, and their common matrix.

    Args:
        value_width: of attention's values together.
        is_input_kept: by what it comes from, for its backward pass: it would have to be copied.
    """

    def __init__(self, layers: Sequence[Linear], value_width: int, *, is_input_kept: bool) -> None:
        self.layers, self.value_width = layers, value_width
        names = [_only(layer.lora_A) for layer in layers]
        self.width = layers[0].in_features
        self.outputs = [layer.out_features for layer in layers]
        self.ranks = [layer.r[name] for layer, name in zip(layers, names, strict=True)]
        self.a = [layer.lora_A[name].weight for layer, name in zip(layers, names, strict=True)]
        self.b = [layer.lora_B[name].weight for layer, name in zip(layers, names, strict=True)]
        self.scales = [float(layer.scaling[name]) for layer, name in zip(layers, names, strict=True)]
        self.height, rank = sum(self.outputs), sum(self.ranks)
        self.is_inside_forward = not is_input_kept
        # To read one side once more, or to write and read the other. Going forward the first was no slower for any.
        self.is_inside_backward = self.height <= 2 * self.width
        first = layers[0].base_layer.weight
        self.matrix = first.new_zeros(self.height + rank, self.width + rank)
        for layer, rows in zip(layers, _slices(self.outputs), strict=True):
            part = self.matrix[rows, : self.width]
            part.copy_(layer.base_layer.weight.detach())
            layer.base_layer.weight.data = part
        self._waiting: list[torch.Tensor | None] = [None] * len(layers)
        self._given: torch.Tensor | None = None
        for number, layer in enumerate(layers):
            # Its class, not its forward: what hangs on one layer alone is compiled for each anew.
            layer.__class__ = JoinedLinear
            layer.block, layer.number = self, number

    def slots(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]]:
        """Of each layer: where its A and its B go, each with what goes there, and the factor of B."""
        parts = zip(_slices(self.ranks), _slices(self.outputs), self.a, self.b, self.scales, strict=True)
        return [
            (
                self.matrix[_moved(ranks, self.height), : self.width],
                a,
                self.matrix[rows, _moved(ranks, self.width)],
                b,
                scale,
            )
            for ranks, rows, a, b, scale in parts
        ]

    def of_layer(self, number: int, given: torch.Tensor) -> Any:
        """What this layer makes of (..., width); the first that is asked computes it for all that are given the same."""
        if self._given is not given or self._waiting[number] is None:
            self._given, self._waiting = given, self._multiply(given)
        output, self._waiting[number] = self._waiting[number], None
        if not any(other is not None for other in self._waiting):
            self._given = None
        return output

    def forget(self) -> None:
        """What was computed for layers that were not asked after all."""
        self._given, self._waiting = None, [None] * len(self.layers)

    def _multiply(self, given: torch.Tensor) -> list[torch.Tensor]:
        flat = given.reshape(-1, self.width).to(self.matrix.dtype)
        sizes = self.outputs, self.ranks, self.scales
        # Of an input that is given no gradient the second way would compute one, with what is needed of it.
        is_inside = self.is_inside_forward, self.is_inside_backward or not flat.requires_grad
        products = _Product.apply(flat, self.matrix, *sizes, is_inside, *self.a, *self.b)
        # Of a value a copy: attention keeps it for its backward pass, and the whole product would be kept with it.
        parts = [product.contiguous() if product.shape[1] == self.value_width else product for product in products]
        outputs = [part.unflatten(0, given.shape[:-1]) for part in parts]
        biases = [layer.base_layer.bias for layer in self.layers]
        return [
            output if bias is None else output + bias.to(output.dtype)
            for output, bias in zip(outputs, biases, strict=True)
        ]


class JoinedLinear(Linear):
    """PEFT's layer after :func:`join`: its parameters, and the block's product."""

    block: _Block
    number: int

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        return self.block.of_layer(self.number, x)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        given: torch.Tensor,
        matrix: torch.Tensor,
        outputs: list[int],
        ranks: list[int],
        scales: list[float],
        is_inside: tuple[bool, bool],
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        width, height = given.shape[1], sum(outputs)
        is_inside_forward, is_inside_backward = is_inside
        ctx.sizes = outputs, ranks, scales, is_inside_backward
        if is_inside_forward:
            wide = pad(given, (0, matrix.shape[1] - width))
            # Of the whole rows, whose end is zero: so the compiler sees that it can write into them.
            wide[:, width:] = wide @ matrix[height:].t()
            ctx.save_for_backward(matrix, wide)
            product = wide @ matrix[:height].t()
        else:
            both = given @ matrix[:, :width].t()
            # A copy: the whole would be kept with it. Autocast makes products of bfloat16 out of float32.
            narrow = both[:, height:].contiguous().to(matrix.dtype)
            ctx.save_for_backward(matrix, given, narrow)
            product = both[:, :height] + narrow @ matrix[:height, width:].t()
        products: tuple[torch.Tensor, ...] = product.split(outputs, dim=1)
        return products

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        matrix, given, *narrow = ctx.saved_tensors
        outputs, ranks, scales, is_inside = ctx.sizes
        height, rank = sum(outputs), sum(ranks)
        width = matrix.shape[1] - rank
        given, of_adapters = given[:, :width], narrow[0] if narrow else given[:, width:]
        if is_inside or len(gradients) > 1:
            # Of one gradient and its blank the one pass is quick; of more the blanks make many parts.
            num_blanks = 1 if len(gradients) == 1 else max(1, MANY_PARTS - len(gradients))
            blanks = gradients[0].new_zeros(given.shape[0], rank).tensor_split(num_blanks, dim=1)
            gradients = (torch.cat([*gradients, *blanks], dim=1),)
        # Autocast makes bfloat16 of float32 going forward, and is over by now.
        tall = gradients[0].to(matrix.dtype)
        if is_inside:
            tall[:, height:] = tall @ matrix[:, width:]
            of_narrow = tall[:, height:]
            of_given = tall @ matrix[:, :width]
        else:
            both = tall[:, :height] @ matrix[:height]
            of_narrow = both[:, width:]
            of_given = both[:, :width] + of_narrow @ matrix[height:, :width]
        of_a = (of_narrow.t() @ given).float().split(ranks)
        of_b = [
            scale * (tall[:, rows].t() @ of_adapters[:, columns]).float()
            for rows, columns, scale in zip(_slices(outputs), _slices(ranks), scales, strict=True)
        ]
        return of_given, None, None, None, None, None, *of_a, *of_b


def _slices(sizes: Sequence[int]) -> list[slice]:
    """One after the other, of such sizes."""
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)
