"""What cannot be trained is told in seconds, before weights are loaded."""

import pytest
import transformers

from tasks.contracts.attempt import TryAgain
from tasks.contracts.settings import TrainingSettings
from tasks.models.memory import is_out_of_memory
from tasks.training.micro_batch import read_reduction, reduce
from tasks.training.plan import plan_training
from tasks.training.start import beyond_varlen, binding_of, check_inputs
from tasks.training.zero3_trainer import is_installed
from tests.training import toy

BLOOM = transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return toy.make_model(tmp_path_factory.mktemp("toy") / "model")


def settings(**changes) -> TrainingSettings:
    return TrainingSettings(**(toy.SETTINGS | changes))


@pytest.mark.parametrize(
    ("changes", "longest", "message"),
    [
        ({"global_batch_size": 5}, 20, "training.global_batch_size=5 is not a multiple of 2 ranks; use 4 or 6"),
        ({}, 40, "1 of 48 training rows are longer than the 32 positions of the model"),
        ({"lora": {"target_modules": ["q_proj", "v_prj"]}}, 20, "v_prj match no layer .* are down_proj, gate_proj"),
        ({"lora": {"target_modules": "nothing"}}, 20, "nothing match no layer"),
        ({"lora": {"first_layer": 2}}, 20, "first_layer=2, but the model's 2 layers end at 1"),
        ({"fp8_base": True, "precision": "auto"}, 20, "training.precision=auto is (float32|mixed) here"),
        ({"attention": "flex"}, 20, "attention=flex is for GPUs in bfloat16.*this is cpu in float32; set .*=varlen"),
    ],
)
def test_each_reason_names_the_value_and_what_would_do(model, changes, longest, message):
    with pytest.raises(ValueError, match=message):
        check_inputs(settings(**changes), model, [20] * 47 + [longest], 2)


def test_every_rank_is_asked_for_fp8(model):
    fp8 = settings(fp8_base=True, precision="bfloat16")
    message = (
        r"fp8_base=true: not on rank 8, 9: their GPUs have a compute capability below 8\.9; set training.fp8_base=false"
    )
    with pytest.raises(ValueError, match=message):
        check_inputs(fp8, model, [20] * 48, 2, without_fp8=[8, 9])


def test_an_older_gpu_says_which_it_is(model, monkeypatch):
    monkeypatch.setattr("tasks.training.start.why_not", lambda device: "A100 has compute capability 8.0")
    with pytest.raises(ValueError, match="not on rank 0, 1: A100 has compute capability 8.0; set"):
        check_inputs(settings(fp8_base=True, precision="bfloat16"), model, [20] * 48, 2, without_fp8=[0, 1])


@pytest.mark.skipif(is_installed(), reason="DeepSpeed is installed")
def test_zero3_without_deepspeed_says_what_to_install(model):
    with pytest.raises(ValueError, match=r"zero3 needs DeepSpeed on every node.*pip install .*\[train,zero3\]"):
        check_inputs(settings(strategy="zero3"), model, [20] * 48, 2)


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_mixed_precision_cannot_be_sharded(strategy):
    with pytest.raises(ValueError, match=f"strategy={strategy} cannot shard precision=mixed"):
        settings(strategy=strategy, precision="mixed")


def test_all_reasons_are_told_at_once(model):
    with pytest.raises(ValueError) as caught:
        check_inputs(settings(global_batch_size=5, lora={"target_modules": "nothing"}), model, [50] * 48, 2)
    assert len(str(caught.value).splitlines()) == 3


def test_one_target_may_be_given_as_its_name(model):
    assert check_inputs(settings(lora={"target_modules": "q_proj"}), model, [20] * 48, 2).total_steps == 24


def test_memory_that_was_missing_once_halves_the_micro_batch_and_twice_ends_it(tmp_path):
    assert "the run takes 3 at a time and accumulates 2 times as often" in str(
        reduce(tmp_path, tried=6, why="rank 1 ran out of memory", already=None)
    )
    reduction = read_reduction(tmp_path, 6)
    assert (reduction.tried, reduction.use) == (6, 3)
    # Whoever sets another size means it.
    assert read_reduction(tmp_path, 4) is None
    # Whoever leaves it to the program, means whatever it took.
    assert read_reduction(tmp_path, "auto") == reduction
    again = str(reduce(tmp_path, tried=3, why="rank 1 ran out of memory", already=reduction))
    assert "after the size had been lowered from 6: set training.gradient_checkpointing=true" in again
    assert read_reduction(tmp_path, 6).use == 3


def test_one_conversation_that_does_not_fit_cannot_be_split(tmp_path):
    assert "gradient_checkpointing" in str(reduce(tmp_path, tried=1, why="rank 0 ran out of memory", already=None))
    assert read_reduction(tmp_path, 1) is None
    again = reduce(tmp_path, tried=1, why="rank 0 ran out of memory", already=None, may_recompute=True)
    assert isinstance(again, TryAgain)
    assert "recomputes all activations" in str(again)
    assert (read_reduction(tmp_path, "auto").use, read_reduction(tmp_path, "auto").recompute) == (1, 1)


def test_torchs_words_for_missing_memory_are_known():
    import torch

    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_checkpoints_from_before_a_setting_there_was_are_gone_on_from_with_what_was_done_then(model):
    rows = toy.make_rows(model.parent / "rows") / "train.arrow"

    def binding(**changes):
        asked = settings(precision="bfloat16", **changes)
        return binding_of(asked, plan_training(asked, num_rows=48, world_size=2), base_digest="-", rows_file=rows)

    assert "training.fp8_base" not in binding()
    assert binding(fp8_base=True) == binding() | {"training.fp8_base": True}


def test_a_model_of_experts_is_not_worth_fp8(tmp_path, monkeypatch):
    transformers.Qwen3MoeConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, moe_intermediate_size=64, num_experts=8, head_dim=16,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    ).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(ValueError, match=r"training.fp8_base=true: 8% of the decoder's parameters"):
        check_inputs(settings(fp8_base=True, precision="bfloat16"), tmp_path, [20] * 48, 2)


@pytest.mark.parametrize(
    ("attention", "config", "message"),
    [
        (
            "varlen",
            BLOOM,
            "attention=varlen: BloomForCausalLM takes no attention but its own, .* set training.precision=float32",
        ),
        ("flex", BLOOM, "attention=flex: BloomForCausalLM takes no attention but its own"),
        (
            "flex",
            transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2),
            "attention=flex: GPT2LMHeadModel does not",
        ),
    ],
)
def test_a_model_that_keeps_its_own_attention_is_refused(attention, config, message, tmp_path, monkeypatch):
    config.save_pretrained(tmp_path)
    monkeypatch.setattr("tasks.training.start.is_packed", lambda settings: True)
    with pytest.raises(ValueError, match=message):
        check_inputs(settings(attention=attention), tmp_path, [20] * 48, 2)


@pytest.mark.parametrize(
    ("config", "longest", "beyond"),
    [
        (transformers.MistralConfig(sliding_window=16), 17, "sliding_window=16 tokens, and the longest row has 17"),
        (transformers.MistralConfig(sliding_window=16), 16, None),
        (transformers.Qwen2Config(sliding_window=16, use_sliding_window=False), 17, None),
        (transformers.Gemma3TextConfig(sliding_window=16), 17, "sliding_window=16 tokens, and the longest row has 17"),
        (transformers.Gemma2Config(), 8, "attn_logit_softcapping=50.0"),
        (
            transformers.Llama4TextConfig(attention_chunk_size=16),
            17,
            "attention_chunk_size=16 tokens, and the longest row has 17",
        ),
        (transformers.LlamaConfig(), 9999, None),
    ],
)
def test_what_varlen_would_leave_out_is_known_from_the_configuration(config, longest, beyond):
    assert beyond_varlen(config, longest) == beyond


def test_a_window_shorter_than_a_row_is_refused_before_the_row_comes(tmp_path, monkeypatch):
    config = transformers.MistralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=16,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    monkeypatch.setattr("tasks.training.start.is_packed", lambda settings: True)
    with pytest.raises(
        ValueError, match=r"sliding_window=16 tokens, .* has 20, which it would leave out; set training.attention=flex"
    ):
        check_inputs(settings(), tmp_path, [20] * 48, 2)
    assert check_inputs(settings(attention="flex"), tmp_path, [20] * 48, 2).total_steps == 24
