"""On a GPU, TRL's trainer over conversations laid end to end: no padding, no logits kept, no waiting for the GPU.

What TRL adds to every micro-batch (entropy, accuracy, token counts over all ranks) reads numbers off the GPU, which has then
nothing queued for a while; here the tokens are counted on the CPU, where their lengths are known.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from tasks.dataset.stored import IGNORED
from tasks.models.joined_lora import JoinedProducts, join
from tasks.models.packed_attention import check_kept_apart, end_to_end
from tasks.models.shards import whole
from tasks.training.answer_only_loss import per_answer
from tasks.training.frozen_head import frozen_head_loss, is_plain_product, leave_out

POSITIONS, TARGETS = "answer_positions", "answer_targets"
ATTENTION_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""The fastest first, as measured on Hopper."""

KINDS_OF_LAYERS = 64
"""A kind of layer is compiled by itself (with such adapters or others, with a window or none), and so is what it is given (a
gradient to hand on or none; lengths met once, any, all equal). Past torch's own limit, 8, a layer runs uncompiled."""


class PackedTrainer(SFTTrainer):
    """:class:`~trl.SFTTrainer` with ``padding_free=True`` on a model told its attention (``packed_attention.py``).

    The loss is that of :class:`~trl.SFTTrainer`: cross-entropy of the answers, over the answer tokens of the global batch;
    a test holds loss and gradient to it. Where the head is no plain product, the logits of all answers are held at once.
    """

    data_collator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        base = self.model.get_base_model()
        check_kept_apart(base)
        self._joined: JoinedProducts | None = None
        self._head: torch.nn.Module | None = None
        if is_plain_product(base):
            self._head = base.get_output_embeddings()
            # The model then returns what would go into the head.
            leave_out(self._head)
        self.add_callback(_CompileLayers(base))
        self.data_collator = _WithAnswers(self.data_collator)

    def join_adapters(self) -> JoinedProducts | None:
        """Multiply adapters together with their matrices from now on, where these are whole; None: nowhere."""
        base = self.model.get_base_model()
        ids = torch.zeros((1, 8), dtype=torch.long, device=base.device)

        def run() -> None:
            with torch.no_grad():
                base(**end_to_end(ids, (5, 3)), use_cache=False)

        self._joined = join(self.model, run)
        if self._joined:
            self.add_callback(_TakeWeights(self._joined))
        return self._joined

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Cross-entropy in nats, summed over this rank's answers and divided as :class:`~transformers.Trainer` asks."""
        if return_outputs:
            raise NotImplementedError("this trainer evaluates nothing: predictions are a stage of their own")
        context = {
            name: value for name, value in inputs.items() if name not in ("labels", "seq_idx", POSITIONS, TARGETS)
        }
        if self._joined:
            self._joined.forget()
        output = model(**context, use_cache=False, logits_to_keep=inputs[POSITIONS]).logits[0]
        if self._head is None:
            total = cross_entropy(output.float(), inputs[TARGETS], reduction="sum")
        else:
            weight = whole(self._head.weight)
            total = frozen_head_loss(output.to(weight.dtype), weight, inputs[TARGETS])
        return per_answer(self, total, inputs[TARGETS].shape[0], num_items_in_batch)

    @contextmanager
    def fast_kernels(self) -> Iterator[None]:
        """Around training: the fastest attention there is, and no adapter input cast to float32 and back.

        PEFT casts every input to the precision of the adapter's weights, which autocast undoes.
        """
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(ATTENTION_KERNELS, set_priority=True))
            stack.enter_context(disable_input_dtype_casting(self.model))
            yield


def compile_layers(model: Any, backend: str = "inductor") -> None:
    """Let each decoder layer of a causal language model, and the norms beside them, be compiled when it is first used.

    Its computation only, not what hangs on its call: FSDP2 gathers a layer's matrices there and drops them after; and not its
    recomputing, which gives dropout the random numbers that it had. Once, when nobody will change what is recomputed.
    """
    torch._dynamo.config.recompile_limit = KINDS_OF_LAYERS
    decoder = model.get_decoder()
    # Each family has its own class and name for that after the last; one has an embedding that is called so as well.
    norms = [
        part
        for part in decoder.children()
        if "norm" in type(part).__name__.lower() and not isinstance(part, torch.nn.Embedding)
    ]
    layers = getattr(decoder, "layers", None)
    if layers is None:
        logging.getLogger(__name__).warning(
            "%s has no `layers`: they are not compiled, which is slower and takes more memory than is reckoned with; if it runs "
            "out, set training.gradient_checkpointing=true",
            type(decoder).__name__,
        )
    for part in (*(layers or ()), *norms):
        is_recomputed = getattr(part, "gradient_checkpointing", False)
        if is_recomputed:
            # Transformers recomputes within `forward`. Compiled with it, a layer that keeps anything from one product for the
            # next, as joined ones do, is given up by the compiler; and with torch 2.11 dropout drew other masks by `aot_eager`.
            part.gradient_checkpointing = False
        part.forward = torch.compile(part.forward, backend=backend)
        if is_recomputed:
            part.forward = _recomputed(part, part.forward)


def _recomputed(layer: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Recomputed while it is trained, by transformers' own function, but around what is given."""

    def computed(*args: Any, **kwargs: Any) -> Any:
        # The backward pass of a GPU has a thread of its own, and so has this limit.
        torch._dynamo.config.recompile_limit = KINDS_OF_LAYERS
        return forward(*args, **kwargs)

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not layer.training:
            return forward(*args, **kwargs)
        return layer._gradient_checkpointing_func(partial(computed, **kwargs), *args)

    return recomputed


class _CompileLayers(TrainerCallback):
    """As training begins: until then nobody has said which layers are recomputed."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        compile_layers(self._model)


class _TakeWeights(TrainerCallback):
    """Into the joined products: as training begins, be they a checkpoint's or new, and after each of the optimiser's steps."""

    def __init__(self, joined: JoinedProducts) -> None:
        self._joined = joined

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._joined.refresh()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._joined.refresh()


class _WithAnswers:
    """A collator that also says where the answers are, while that is still known on the CPU."""

    def __init__(self, collate: Any) -> None:
        self._collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self._collate(examples)
        # Position t predicts the token at t + 1.
        following = batch["labels"][0, 1:]
        positions = (following != IGNORED).nonzero().squeeze(1)
        return {**batch, POSITIONS: positions, TARGETS: following[positions]}
