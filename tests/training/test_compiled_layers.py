"""Layers of several kinds, given inputs of several kinds: each is compiled, none runs as it is."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from tasks.models.packed_attention import PACKED, end_to_end, register
from tasks.training.packed_trainer import compile_layers
from tests.training.toy import POSITIONS, SIZES


def train_a_little() -> None:
    """Upper layers have adapters, every other layer is recomputed; lengths are equal, so that a layer is compiled whole."""
    torch.manual_seed(0)
    register()
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 4}, max_position_embeddings=POSITIONS)
    base = AutoModelForCausalLM.from_config(config)
    base.set_attn_implementation(PACKED)
    base.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    upper = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[2, 3])
    model = peft.get_peft_model(base, upper).train()
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


@pytest.mark.filterwarnings("default:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_layers_that_are_recomputed_and_draw_dropout_are_not_compiled(dropout):
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, max_position_embeddings=POSITIONS))
    peft.get_peft_model(base, peft.LoraConfig(r=2, lora_dropout=dropout, target_modules=["q_proj"]))
    base.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    compile_layers(base, backend="eager")
    compiled = [name for name, part in base.get_decoder().named_modules() if "forward" in vars(part)]
    assert compiled == [*([] if dropout else ["layers.0"]), "layers.1", "norm"]


class _NormedEmbedding(torch.nn.Embedding):
    """As one family has it."""
