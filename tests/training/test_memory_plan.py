"""The micro-batch that memory allows: counted on a model without data, held against torch's own account and a GPU's figure."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from tasks.contracts.settings import LoraSettings, TrainingSettings
from tasks.training.frozen_head import TOKENS_AT_A_TIME
from tasks.training.memory_plan import (
    BYTES_PER_LOGIT,
    ENOUGH_TOKENS,
    SHARE_OF_FREE,
    Footprint,
    choose_micro_batch,
    footprint_of,
    kept_bytes,
)
from tasks.training.order import training_order
from tasks.training.plan import plan_training
from tests.benchmarks.llama_8b import SHAPE

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def small(folder):
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    config.save_pretrained(folder)
    return config


def adapted(config, attention, device):
    from peft import get_peft_model

    from tasks.training.adapter import lora_config

    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
        return get_peft_model(base, lora_config(LoraSettings(rank=8), base))


def test_what_is_counted_without_data_is_what_torch_keeps_with_data(tmp_path):
    """Torch's own account of the processor's memory, of two lengths, so that what does not grow with them drops out."""
    from tasks.training.memory_plan import COUNTING, _register_counting

    _register_counting()
    config = small(tmp_path)
    counted = kept_bytes(adapted(config, COUNTING, "meta"), 384) - kept_bytes(adapted(config, COUNTING, "meta"), 128)
    decoder = adapted(config, "sdpa", "cpu").train().get_base_model().get_decoder()
    held = []
    for num_tokens in (128, 384):
        ids = torch.zeros((1, num_tokens), dtype=torch.long)
        decoder(input_ids=ids, use_cache=False)
        with torch.profiler.profile(profile_memory=True) as profile:
            output = decoder(input_ids=ids, use_cache=False)
        held.append(sum(event.self_cpu_memory_usage for event in profile.key_averages()))
        del output
    assert counted == pytest.approx(held[1] - held[0], rel=0.05)


def test_a_gpus_own_figure_lies_a_little_below_the_count(tmp_path):
    """An H200 held 94 GB in training this shape, compiled, 16,384 tokens at a time (docs/training.md)."""
    LlamaConfig(**SHAPE).save_pretrained(tmp_path)
    found = footprint_of(tmp_path, TrainingSettings(lora={"rank": 64}), "bfloat16", 1)
    assert 94e9 < found.fixed + 16_384 * found.per_token < 1.4 * 94e9
    assert 16.1e9 < found.fixed < 25e9
    sharded = footprint_of(tmp_path, TrainingSettings(lora={"rank": 64}, strategy="fsdp"), "bfloat16", 4)
    # Three quarters of the base are elsewhere; two layers and the head are gathered.
    assert sharded.fixed < found.fixed - 9.5e9
    assert (found.is_padded, sharded.is_padded) == (False, False)
    assert footprint_of(tmp_path, TrainingSettings(lora={"rank": 64}), "float32", 1).is_padded
    # Layers compiled and the loss in parts as well; zero3 has neither.
    assert sharded.per_token == found.per_token
    parts = footprint_of(tmp_path, TrainingSettings(lora={"rank": 64}, strategy="zero3"), "bfloat16", 4)
    assert parts.per_token > found.per_token + 1e6
    upper = footprint_of(tmp_path, TrainingSettings(lora={"rank": 64, "first_layer": 16}), "bfloat16", 1)
    assert upper.per_token < 0.55 * found.per_token
    assert upper.per_token_recomputed == pytest.approx(found.per_token_recomputed, rel=0.05)


def test_where_logits_are_capped_those_of_all_answers_are_reckoned_with(tmp_path):
    """As Gemma 2's are: their loss is not computed a few thousand tokens at a time."""
    sizes = {
        "vocab_size": 32_000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 32,
    }  # fmt: skip
    found = {}
    for cap in (None, 30.0):
        Gemma2Config(**sizes, final_logit_softcapping=cap).save_pretrained(tmp_path / str(cap))
        found[cap] = footprint_of(tmp_path / str(cap), TrainingSettings(), "bfloat16", 1)
    assert found[30.0].per_token == pytest.approx(found[None].per_token + 32_000 * BYTES_PER_LOGIT)
    assert found[30.0].fixed == pytest.approx(found[None].fixed - TOKENS_AT_A_TIME * 32_000 * BYTES_PER_LOGIT)


def chosen(*, free_gbytes, lengths=(1000,) * 64, world_size=2, **changes):
    values = {"global_batch_size": 32, "per_device_batch_size": "auto", "gradient_checkpointing": "auto"}
    settings = TrainingSettings(**(values | changes))
    order = training_order(
        lengths, global_batch_size=settings.global_batch_size, steps_per_epoch=2, num_epochs=1, seed=1
    )
    footprint = Footprint(fixed=20e9, per_token=6e6, per_token_recomputed=5e5, per_token_of_layer=2e5)
    found = choose_micro_batch(settings, lengths, order, world_size, footprint=footprint, free_bytes=free_gbytes * 1e9)
    return found, settings


@pytest.mark.parametrize(
    ("free_gbytes", "size", "recomputed"),
    [
        (1000, 16, False),
        (140, 16, False),
        (80, 8, False),
        (40, 2, False),
        (28, 1, 4),
        (26.5, 1, 2),
        (25, 4, True),
        (23, 1, True),
    ],
)
def test_as_many_as_fit_are_taken_and_no_more_is_recomputed_than_it_takes(free_gbytes, size, recomputed):
    found, settings = chosen(free_gbytes=free_gbytes)
    assert (found.per_device_batch_size, found.gradient_checkpointing) == (size, recomputed)
    plan = plan_training(
        settings.model_copy(
            update={"per_device_batch_size": size, "warmup_steps": 0, "save_every_steps": 1, "log_every_steps": 1}
        ),
        num_rows=64,
        world_size=2,
    )
    assert plan.world_size * plan.per_device_batch_size * plan.accumulation_steps == 32
    assert f"{size} of 16 conversations at a time" in found.why


def test_the_longest_micro_batch_in_the_order_of_training_decides():
    lengths = [100] * 63 + [9000]
    found, _ = chosen(free_gbytes=80, lengths=lengths)
    assert (80e9 * SHARE_OF_FREE - 20e9) // 6e6 == 8666
    # The long one does not fit by itself without recomputation, however short the others are.
    assert found.gradient_checkpointing == 4
    assert "activations of one layer in 4 recomputed" in found.why
    kept, _ = chosen(free_gbytes=90, lengths=lengths)
    assert not kept.gradient_checkpointing
    assert kept.per_device_batch_size >= 4


def test_padding_counts_where_there_is_any():
    lengths = [100] * 63 + [9000]
    settings = TrainingSettings(global_batch_size=32, per_device_batch_size="auto")
    order = training_order(lengths, global_batch_size=32, steps_per_epoch=2, num_epochs=1, seed=1)
    sizes = []
    for is_padded in (False, True):
        footprint = Footprint(
            20e9, per_token=6e6, per_token_recomputed=5e5, per_token_of_layer=2e5, is_padded=is_padded
        )
        found = choose_micro_batch(settings, lengths, order, 2, footprint=footprint, free_bytes=100e9)
        sizes.append(found.per_device_batch_size)
    assert sizes == [16, 1]


def test_no_more_is_taken_than_a_gpu_gains_from():
    found, _ = chosen(free_gbytes=100_000, lengths=[10_000] * 64)
    assert found.per_device_batch_size == int(np.ceil(ENOUGH_TOKENS / 10_000))


def test_what_is_set_stays_as_it_is_set_and_too_little_memory_is_said():
    found, _ = chosen(free_gbytes=40, gradient_checkpointing=True, per_device_batch_size=4)
    assert (found.per_device_batch_size, found.gradient_checkpointing) == (4, True)
    found, _ = chosen(free_gbytes=40, gradient_checkpointing=False, per_device_batch_size=16)
    assert (found.per_device_batch_size, found.gradient_checkpointing) == (16, False)
    assert "more than the 90% to count on; tried all the same" in found.why
    found, _ = chosen(free_gbytes=21)
    assert (found.per_device_batch_size, found.gradient_checkpointing) == (1, True)
    assert "tried all the same" in found.why
