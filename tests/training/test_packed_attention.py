"""Conversations laid end to end must see themselves alone, and train to the loss of padded ones."""

import pytest
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

from tasks.models.packed_attention import (
    FLEX,
    MOST_MOVED,
    MOST_SEEN_ACROSS,
    PACKED,
    check_kept_apart,
    packed_attention,
    register,
    second_of_two,
)
from tests.training.toy import SIZES


def model_of(config, attention):
    torch.manual_seed(0)
    register()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.set_attn_implementation(attention)
    return model


def apart(query, key, value, lengths):
    """Each conversation by itself, with torch's plain attention."""
    parts = [part.split(lengths, dim=2) for part in (query, key, value)]
    outputs = [
        scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def packed(query, key, value, lengths, scaling=None):
    bounds = torch.tensor([0, *lengths], device=query.device).cumsum(0).to(torch.int32)
    return packed_attention(
        torch.nn.Module(), query, key, value, None, cu_seq_lens_q=bounds, max_length_q=max(lengths), scaling=scaling
    )[0]


def heads(lengths, device, dtype):
    torch.manual_seed(0)
    return [torch.randn(1, num, sum(lengths), 64, device=device, dtype=dtype, requires_grad=True) for num in (4, 2, 2)]


@pytest.mark.parametrize("lengths", [[6, 6, 6], [3, 9, 1]])
def test_without_a_gpu_conversations_see_themselves_alone(lengths):
    parts = heads(lengths, "cpu", torch.float32)
    whole = packed(*parts, lengths, scaling=0.3)
    which = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = (which[:, None] == which).tril()
    together = scaled_dot_product_attention(*parts, attn_mask=allowed, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(whole, together)
    changed = [part.clone() for part in parts]
    changed[1][:, :, 0] += 1
    first = lengths[0]
    assert not torch.equal(packed(*changed, lengths, scaling=0.3)[:, :first], whole[:, :first])
    assert torch.equal(packed(*changed, lengths, scaling=0.3)[:, first:], whole[:, first:])


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[17, 128, 1, 60], [64, 64], [200]])
def test_conversations_see_themselves_alone_and_so_do_their_gradients(lengths):
    ours, theirs = heads(lengths, "cuda", torch.bfloat16), heads(lengths, "cuda", torch.bfloat16)
    outputs = packed(*ours, lengths), apart(*theirs, lengths)
    torch.testing.assert_close(*outputs, atol=2e-2, rtol=2e-2)
    for output in outputs:
        (output.float() * torch.arange(output.shape[1], device="cuda")[None, :, None, None]).sum().backward()
    for mine, its in zip(ours, theirs, strict=True):
        error = (mine.grad - its.grad).float().norm() / its.grad.float().norm()
        assert error < 2e-2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "boundaries"),
        ({"cu_seq_lens_q": torch.tensor([0, 4]), "max_length_q": 4, "dropout": 0.1}, "dropout"),
        ({"cu_seq_lens_q": torch.tensor([0, 4]), "max_length_q": 4, "sliding_window": 2}, "sliding window"),
        ({"cu_seq_lens_q": torch.tensor([0, 4]), "max_length_q": 4, "softcap": 50.0}, "no softcap"),
        ({"cu_seq_lens_q": torch.tensor([0, 4]), "max_length_q": 4, "s_aux": torch.zeros(4)}, "no s_aux"),
    ],
)
def test_what_it_would_leave_out_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        packed_attention(torch.nn.Module(), *heads([4], "cpu", torch.float32), None, **settings)


@pytest.mark.parametrize(
    "config", [transformers.LlamaConfig(**SIZES), transformers.PhiConfig(**SIZES)], ids=["llama", "phi"]
)
def test_a_model_of_attention_alone_keeps_conversations_apart(config):
    model = model_of(config, PACKED).train()
    seen, moved = second_of_two(model)
    assert seen == 0
    assert moved < 0.01
    assert model.training
    check_kept_apart(model)


def test_a_vocabulary_smaller_than_the_ids_of_the_look_will_do():
    seen, moved = second_of_two(model_of(transformers.LlamaConfig(**SIZES | {"vocab_size": 4}), PACKED))
    assert seen == 0
    assert moved < 0.01


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2),
            r"MambaForCausalLM does not keep .* moved by \d+\.\d% .*precision=float32",
        ),
        # It counts positions from the first token of all.
        (
            transformers.BartConfig(
                vocab_size=64, d_model=32, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=64, dropout=0.0,
                pad_token_id=0, max_position_embeddings=64, decoder_start_token_id=0, forced_eos_token_id=None,
            ),
            r"BartForCausalLM does not keep .*, and by \d+\.\d% when it was alone",
        ),
        # It hands on no boundaries.
        (transformers.StableLmConfig(**SIZES), "StableLmForCausalLM, .*needs the conversations' boundaries.*=flex, or"),
        (transformers.Gemma2Config(**SIZES, head_dim=16), "Gemma2ForCausalLM, .*no softcap.*=flex, or"),
    ],
    ids=["mamba", "bart", "stablelm", "gemma 2"],
)  # fmt: skip
def test_a_model_that_reads_the_second_in_another_way_than_alone_is_refused(config, said):
    with pytest.raises(ValueError, match=said):
        check_kept_apart(model_of(config, PACKED))


def test_what_is_no_number_is_no_pass(monkeypatch):
    monkeypatch.setattr("tasks.models.packed_attention.second_of_two", lambda model: (float("nan"), 0.0))
    with pytest.raises(ValueError, match="moved by nan%"):
        check_kept_apart(model_of(transformers.LlamaConfig(**SIZES), PACKED))


# Shown, and no errors: torch's compiler warns of itself wherever it traces.
@pytest.mark.filterwarnings("default")
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("config", "attention"),
    [
        (transformers.LlamaConfig(**SIZES), PACKED),
        (transformers.LlamaConfig(**SIZES), FLEX),
        (transformers.Gemma2Config(**SIZES, head_dim=16), FLEX),
    ],
    ids=["varlen", "flex", "flex and gemma 2"],
)
def test_conversations_are_kept_apart_on_a_gpu(config, attention):
    seen, moved = second_of_two(model_of(config, attention).cuda())
    assert seen < MOST_SEEN_ACROSS
    assert moved < MOST_MOVED
