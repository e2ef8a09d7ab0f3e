"""Greedy decoding over a cache of fixed size; on a GPU with one launch a token, a step's kernels as one CUDA graph.

From Python the launches of a step take 80 ms for 32 layers, whatever the batch (measured on an H100), which is many times the
GPU's work. The cache is transformers' own; everything that changes from step to step is a tensor on the device.

On a processor the same steps are taken without a graph: a cache that grows is copied at every step, which was a third of the time
there. Rows whose answers have ended are let go of.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from tasks.models.memory import is_out_of_memory
from tasks.models.packed_attention import PACKED, register

STEPS_AT_ONCE = 8
"""Steps between two looks at whether all answers have ended: each look waits for the device."""
ALIGNMENT = 16
"""The cache's length is a multiple of it, as fused attention wants its masks."""
WARMUP_STEPS = 2
"""Before capture: libraries take their workspaces in the first call."""
WORTH_LETTING_GO = 0.25
"""Of the rows: so many must have ended before the others are copied together, which costs about a step."""
TOKENS_AT_ONCE = 16_384
"""Prompts are read in parts of about so many: enough to fill a GPU, few enough for their intermediate results."""


def has_fixed_cache(model: PreTrainedModel) -> bool:
    """Whether the model's cache holds every token (no sliding windows), and its layers take packed prompts and a step after them.

    What layers hand to their attention (boundaries, sinks, caps) cannot be seen from outside: two prompts of a token or two are
    read and one step is taken.
    """
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        return False
    with _attention(model, PACKED) as is_taken:
        if not is_taken:
            return False
    if any(type(layer) is not StaticLayer for layer in StaticCache(config=model.config, max_cache_len=1).layers):
        return False
    try:
        with torch.inference_mode():
            FixedCacheDecoder(model, end=-1, pad=0, batch_size=2, max_prompt_tokens=2, max_new_tokens=2).try_out()
    except (ValueError, TypeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        # Slower, and it shall be seen: a kind of model that did take them may have stopped to.
        warnings.warn(
            f"{type(model).__name__} does not take packed prompts ({type(error).__name__}: {error}): its answers are made by "
            "transformers' generate, which is slower",
            stacklevel=2,
        )
        return False
    return True


def left_padded(prompts: Sequence[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and where they are no padding, both (prompts, longest): decoders go on from the right."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts], device=device)
    is_real = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in prompts], device=device)
    return ids, is_real


@contextmanager
def _attention(model: PreTrainedModel, implementation: str) -> Iterator[bool]:
    """The model with another attention, and then with its own again; False: it keeps its own, whatever it is told."""
    register()
    own = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield model.config._attn_implementation == implementation
    finally:
        model.set_attn_implementation(own)


def _nats(logits: torch.Tensor, tokens: Sequence[int]) -> float:
    """How unlikely the tokens were by the logits (tokens, vocabulary) before each."""
    expected = torch.tensor(tokens, device=logits.device)
    return float(torch.nn.functional.cross_entropy(logits.float(), expected, reduction="sum"))


def _chunks(texts: Sequence[list[int]]) -> Iterator[tuple[int, int]]:
    """First and one past the last of successive texts that are read together."""
    first, num_tokens = 0, 0
    for number, text in enumerate(texts):
        if number > first and num_tokens + len(text) > TOKENS_AT_ONCE:
            yield first, number
            first, num_tokens = number, 0
        num_tokens += len(text)
    yield first, len(texts)


class FixedCacheDecoder:
    """Answers batches of up to ``batch_size`` prompts of up to ``max_prompt_tokens`` tokens.

    Args:
        end: token that ends an answer; ``pad``: token for the places before a shorter prompt.

    Attributes:
        nats: of the last batch, how unlikely each given answer was; 0 where none was given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        end: int,
        pad: int,
        batch_size: int,
        max_prompt_tokens: int,
        max_new_tokens: int,
    ) -> None:
        self._model: Any = model
        self._end, self._pad = end, pad
        self.batch_size, self.max_prompt_tokens, self.max_new_tokens = batch_size, max_prompt_tokens, max_new_tokens
        self.nats: list[float] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._allocate()

    def _allocate(self) -> None:
        """Room for a whole batch."""
        device, batch_size = self._model.device, self.batch_size
        length = -(-(self.max_prompt_tokens + self.max_new_tokens) // ALIGNMENT) * ALIGNMENT
        self._cache = StaticCache(config=self._model.config, max_cache_len=length)
        self._token = torch.zeros((batch_size, 1), dtype=torch.long, device=device)
        self._position = torch.zeros((batch_size, 1), dtype=torch.long, device=device)
        self._seen = torch.zeros((batch_size, 1, 1, length), dtype=torch.bool, device=device)
        self._column = torch.zeros(1, dtype=torch.long, device=device)
        self._answers = torch.zeros((batch_size, self.max_new_tokens), dtype=torch.long, device=device)
        self._num_new = torch.zeros(1, dtype=torch.long, device=device)
        self._has_ended = torch.zeros(batch_size, dtype=torch.bool, device=device)
        # Which of the batch stands in each row, and the answers of those that were let go of.
        self._rows = list(range(batch_size))
        self._let_go: dict[int, list[int]] = {}

    def answer(self, prompts: Sequence[list[int]], references: Sequence[list[int]] | None = None) -> list[list[int]]:
        """The new token ids of each prompt; what follows an ``end`` means nothing.

        Args:
            references: token ids of an answer that is given, or none, for each prompt; they do not change what is answered.
                :attr:`nats` holds afterwards how unlikely each was, which costs its own tokens and not the prompt's again.

        Raises:
            ValueError: more or longer prompts than it was made for.
        """
        width = max(map(len, prompts))
        if len(prompts) > self.batch_size or width > self.max_prompt_tokens:
            raise ValueError(
                f"{len(prompts)} prompts of up to {width} tokens, made for {self.batch_size} of {self.max_prompt_tokens}"
            )
        if self._let_go:
            self._allocate()
        with torch.inference_mode():
            self._run(prompts, references or [[]] * len(prompts), width)
        last = zip(self._rows, self._answers[:, : int(self._num_new)].tolist(), strict=True)
        answers = self._let_go | dict(last)
        return [answers[row] for row in range(len(prompts))]

    def try_out(self) -> None:
        """Read two prompts and take a step, without a graph."""
        self._read([[0], [0, 0]], [[], []], 2)
        self._step()

    def _run(self, prompts: Sequence[list[int]], references: Sequence[list[int]], width: int) -> None:
        if self._graph is None and self._model.device.type == "cuda":
            with torch.cuda.device(self._model.device):
                self._capture()
        self._read(prompts, references, width)
        for made in range(1, self.max_new_tokens):
            # On a processor there is nothing to wait for.
            if self._graph is None or made % STEPS_AT_ONCE == 1:
                if bool(self._has_ended.all()):
                    break
                if self._graph is None:
                    self._let_go_of_ended()
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()

    def _read(self, prompts: Sequence[list[int]], references: Sequence[list[int]], width: int) -> None:
        """Put the prompts' keys and values into the cache, each ending at column ``width``, and find their first tokens."""
        device, num = self._model.device, len(prompts)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        columns = torch.arange(self._seen.shape[-1], device=device)
        self._seen.zero_()
        self._seen[:num, 0, 0] = (columns >= width - lengths[:, None]) & (columns < width)
        # The rows of a batch that is not full see one place: no row of the softmax may be empty.
        self._seen[num:, 0, 0, width - 1] = True
        self._position.zero_()
        self._position[:num, 0] = lengths
        self._column.fill_(width)
        self._num_new.zero_()
        self._answers.zero_()
        logits = []
        self.nats = []
        with _attention(self._model, PACKED):
            for first, last in _chunks([prompt + given for prompt, given in zip(prompts, references, strict=True)]):
                logits.append(self._read_chunk(prompts[first:last], references[first:last], first, width))
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(width)
        self._has_ended.zero_()
        self._take(torch.nn.functional.pad(torch.cat(logits), (0, 0, 0, self.batch_size - num)))
        self._has_ended[num:] = True

    def _read_chunk(
        self, prompts: Sequence[list[int]], references: Sequence[list[int]], row: int, width: int
    ) -> torch.Tensor:
        """Logits (prompts, vocabulary) after each of the prompts, which the cache holds from ``row`` on.

        A reference follows its prompt, which does not see it, and is not kept.
        """
        device = self._model.device
        texts = [prompt + given for prompt, given in zip(prompts, references, strict=True)]
        lengths, of_prompts = (torch.tensor([len(part) for part in parts]) for parts in (texts, prompts))
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
        kept = (positions < torch.repeat_interleave(of_prompts, lengths)).nonzero()[:, 0]
        rows = torch.repeat_interleave(torch.arange(row, row + len(prompts)), of_prompts).to(device)
        columns = (positions[kept] + width - torch.repeat_interleave(of_prompts, of_prompts)).to(device)
        # The first of a text's is what follows the prompt, the others what follows all but the last of the reference.
        foretold = [max(1, len(given)) for given in references]
        at = [
            torch.arange(num) + begin
            for num, begin in zip(foretold, (bounds[:-1] + of_prompts - 1).tolist(), strict=True)
        ]
        packed = DynamicCache(config=self._model.config)
        output = self._model(
            input_ids=torch.tensor([list(chain.from_iterable(texts))], device=device),
            position_ids=positions[None].to(device),
            past_key_values=packed,
            use_cache=True,
            logits_to_keep=torch.cat(at).to(device),
            cu_seq_lens_q=bounds.to(device, torch.int32),
            max_length_q=int(lengths.max()),
        )
        kept = kept.to(device)
        for layer, read in zip(self._cache.layers, packed.layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(
                    *(part.expand(self.batch_size, -1, -1, -1) for part in (read.keys, read.values))
                )
            layer.keys[rows, :, columns] = read.keys[0, :, kept].transpose(0, 1)
            layer.values[rows, :, columns] = read.values[0, :, kept].transpose(0, 1)
        logits: torch.Tensor = output.logits[0]
        starts = [0, *accumulate(foretold)]
        for start, given in zip(starts[:-1], references, strict=True):
            self.nats.append(_nats(logits[start : start + len(given)], given) if given else 0.0)
        return logits[starts[:-1]]

    def _let_go_of_ended(self) -> None:
        """Go on with the rows whose answers have not ended."""
        left = (~self._has_ended).nonzero()[:, 0]
        if len(left) > (1 - WORTH_LETTING_GO) * len(self._rows):
            return
        num_new = int(self._num_new)
        for place in self._has_ended.nonzero()[:, 0].tolist():
            self._let_go[self._rows[place]] = self._answers[place, :num_new].tolist()
        self._rows = [self._rows[place] for place in left.tolist()]
        for name in ("_token", "_position", "_seen", "_answers", "_has_ended"):
            setattr(self, name, getattr(self, name)[left])
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[left], layer.values[left]

    def _step(self) -> None:
        self._seen.index_fill_(3, self._column, True)
        output = self._model(
            input_ids=self._token,
            attention_mask=self._seen,
            position_ids=self._position,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._position.add_(1)
        self._column.add_(1)
        self._take(output.logits[:, -1])

    def _take(self, logits: torch.Tensor) -> None:
        """The likeliest token of each row becomes the next input; of equals the first, as in ``generate``."""
        token = logits.argmax(-1)
        self._token.copy_(token[:, None])
        self._answers.index_copy_(1, self._num_new, token[:, None])
        self._num_new.add_(1)
        self._has_ended.logical_or_(token == self._end)

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_STEPS):
                self._num_new.zero_()
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self._num_new.zero_()
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog asks the device from a thread of its own, which the default mode forbids.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step()
        self._graph = graph
