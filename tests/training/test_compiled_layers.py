"""Layers of several kinds, given inputs of several kinds: each is compiled, none runs as it is."""

from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from tasks.models.joined_lora import join
from tasks.models.packed_attention import PACKED, end_to_end, register
from tasks.training.packed_trainer import compile_layers
from tests.training.toy import POSITIONS, SIZES


def train_a_little() -> None:
    """Each layer has other adapters, every other is recomputed; lengths are equal, so that a layer is compiled whole."""
    torch.manual_seed(0)
    register()
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 4}, max_position_embeddings=POSITIONS)
    base = AutoModelForCausalLM.from_config(config)
    base.set_attn_implementation(PACKED)
    base.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    targets = r".*layers\.(1\..*q_proj|2\..*(q_proj|down_proj)|3\..*(q_proj|down_proj|up_proj))"
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets)).train()
    compile_layers(base, backend="eager")
    for lengths in ((5, 5), (7, 7), (6, 6, 6)):
        ids = torch.arange(sum(lengths))[None]
        model(**end_to_end(ids, lengths), use_cache=False).logits.square().mean().backward()


@pytest.fixture(autouse=True)
def _from_nothing():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Shown, and no errors: torch's compiler warns of itself wherever it traces.
@pytest.mark.filterwarnings("default")
def test_no_kind_of_layer_is_left_out(monkeypatch):
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        train_a_little()
        # So many kinds they are: by torch's own limit some would be.
        torch._dynamo.reset()
        monkeypatch.setattr("tasks.training.packed_trainer.KINDS_OF_LAYERS", 8)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            train_a_little()


@pytest.mark.parametrize(
    ("config", "compiled"),
    [
        (LlamaConfig(**SIZES, max_position_embeddings=POSITIONS), {"layers.0", "layers.1", "norm"}),
        # Its layers have another name.
        (GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=16, n_positions=8), {"ln_f"}),
    ],
    ids=["llama", "gpt2"],
)
def test_layers_are_compiled_and_the_last_norm_and_nothing_else(config, compiled, caplog):
    model = AutoModelForCausalLM.from_config(config)
    decoder = model.get_decoder()
    decoder.embed_again = _NormedEmbedding(4, 4)
    compile_layers(model, backend="eager")
    assert {name for name, part in decoder.named_modules() if "forward" in vars(part)} == compiled
    assert ("GPT2Model has no `layers`: they are not compiled" in caplog.text) == ("ln_f" in compiled)


def gradients(
    dropout: float, *, is_recomputed: bool, where: str = "cpu", backend: str = "aot_eager"
) -> tuple[torch.Tensor, int, int]:
    """Of the adapters, after two passes, back in a thread of its own as on a GPU; how many pieces were compiled; how many bytes
    were kept. Without dropout adapters are joined. On a GPU products are bfloat16.
    """
    is_gpu = where != "cpu"
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    register()
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, max_position_embeddings=POSITIONS))
    base.to(where, torch.bfloat16 if is_gpu else torch.float32).set_attn_implementation(PACKED)
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_dropout=dropout, target_modules="all-linear")).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = end_to_end(torch.arange(12, device=where)[None], (6, 6))
    joined = join(model, lambda: model(**batch, use_cache=False))
    assert (joined is None) == bool(dropout)
    if joined:
        joined.refresh()
    if is_recomputed:
        base.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    compile_layers(base, backend)
    torch.manual_seed(1)
    kept: list[int] = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.nbytes) or one, lambda one: one)
    for _ in range(2):
        with keep, torch.autocast(where, torch.bfloat16, enabled=is_gpu):
            loss = model(**batch, use_cache=False).logits.square().mean()
        with ThreadPoolExecutor(1) as other:
            other.submit(loss.backward).result()
    assert not counters["graph_break"]
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    return found, counters["stats"]["unique_graphs"], sum(kept)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_that_are_recomputed_are_compiled_and_draw_the_masks_that_they_had(dropout):
    kept, num_pieces, num_bytes = gradients(dropout, is_recomputed=False)
    again, num_pieces_again, num_bytes_again = gradients(dropout, is_recomputed=True)
    assert num_bytes_again < 0.5 * num_bytes
    # Kept, the first layer has no gradient to hand on, and is another kind; recomputed it has.
    assert (num_pieces, num_pieces_again) == (3, 2)
    assert kept.norm() > 0
    assert (kept - again).norm() < 1e-6 * kept.norm()


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_on_a_gpu_layers_that_are_recomputed_draw_the_masks_that_they_had(dropout, backend):
    kept, again = (
        gradients(dropout, is_recomputed=each, where="cuda", backend=backend)[0].float() for each in (False, True)
    )
    assert kept.norm() > 0
    # Other masks moved them by 4 % and more.
    assert (kept - again).norm() < 0.01 * kept.norm()


class _NormedEmbedding(torch.nn.Embedding):
    """As one family has it."""
