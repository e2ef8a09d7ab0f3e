"""The model as inference runs it: the base alone, or with an adapter at nearly the base's speed.

In float32 the adapter is added to the weights, which is exact enough to change no answer. In bfloat16 the sum would be weights of
neither model, so the adapter stays beside them, as serving engines hold it: PEFT's own layer takes five products, sums and casts
where :class:`AdaptedLinear` takes two.
"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from tasks.contracts.files import read_json
from tasks.inference.fused_norms import fuse_norms
from tasks.models.load import Resolved, device, load_model
from tasks.models.materialise import weights_digest


class AdaptedLinear(torch.nn.Module):
    """``x W' + b + scale (x A') B'``: W and A in one product, B's added to its result in place.

    Args:
        weight: W, [outputs, inputs].
        down: A, [rank, inputs].
        up: B, [outputs, rank].
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, down: torch.Tensor, up: torch.Tensor, scale: float
    ) -> None:
        super().__init__()
        self.num_outputs, self.scale = len(weight), scale
        self.weight = torch.nn.Parameter(torch.cat([weight, down.to(weight.dtype)]), requires_grad=False)
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        self.up = torch.nn.Parameter(up.T.to(weight.dtype).contiguous(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.nn.functional.linear(x.flatten(0, -2), self.weight)
        output = both[:, : self.num_outputs].addmm_(both[:, self.num_outputs :], self.up, alpha=self.scale)
        if self.bias is not None:
            output += self.bias
        return output.unflatten(0, x.shape[:-1])


def load(folder: Path, adapter: Path | None, precision: Resolved) -> PreTrainedModel:
    """The model in ``folder``, with the adapter's share in its answers where one is given.

    Raises:
        ValueError: in bfloat16, the adapter holds more than LoRA's two factors.
    """
    model = load_model(folder, precision)
    if precision == "bfloat16" and device().type == "cuda":
        fuse_norms(model)
    if adapter is None:
        return model.eval()
    # The adapter in the weights' own precision, as serving engines load it.
    adapted: Any = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
    if precision == "float32":
        model = adapted.merge_and_unload()
        return model.eval()
    return _side_by_side(adapted)


def _side_by_side(adapted: Any) -> PreTrainedModel:
    """Every layer that has an adapter replaced by one that holds both; frees the old one's weights as it goes."""
    names = [name for name, part in adapted.base_model.model.named_modules() if isinstance(part, LoraLayer)]
    model: PreTrainedModel = adapted.base_model.model
    for name in names:
        layer: Any = model.get_submodule(name)
        (key,) = layer.active_adapters
        base = layer.get_base_layer()
        if not isinstance(base, torch.nn.Linear) or layer.lora_variant or layer.lora_B[key].bias is not None:
            raise ValueError(
                f"the adapter's layer {name} is no plain LoRA of a linear layer; use inference.precision=float32, which "
                "adds any adapter to the weights"
            )
        model.set_submodule(
            name,
            AdaptedLinear(
                base.weight, base.bias, layer.lora_A[key].weight, layer.lora_B[key].weight, layer.scaling[key]
            ),
        )
    return model.eval()


def check_base(adapter: Path, base: Path) -> None:
    """Refuse an adapter that was trained on other weights.

    Raises:
        ValueError: the digests differ, or the adapter does not say what it was trained on.
    """
    manifest = adapter / "manifest.json"
    if not manifest.exists():
        raise ValueError(f"{adapter} is not a finished adapter: {manifest} is missing")
    trained_on = read_json(manifest)["base_weights_sha256"]
    if trained_on != (here := weights_digest(base)):
        raise ValueError(f"{adapter} was trained on weights {trained_on[:12]}, the model in {base} has {here[:12]}")
