"""An adapter held beside the weights answers as PEFT's own layers do, at two products instead of five."""

import pytest

# PEFT asks for it by transformers' older name, as tasks/models/load.py says.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")]

MANY = 24


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A toy with biases in its attention and more queries than keys, as Qwen2 has them."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(7)
    config = Qwen2Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=0, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


def adapter(base, folder, **settings):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(11)
    config = LoraConfig(
        r=4, lora_alpha=12, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **settings
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def logits_and_answers(model):
    """Of a padded batch, and of what the model goes on with."""
    import torch

    ids = torch.randint(2, 64, (MANY, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[::2, :4] = 0
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -1]
        answers = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 9:]
    return logits.double(), answers.tolist()


def test_beside_the_weights_and_in_them_and_in_pefts_layers_the_adapter_says_the_same(base, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from tasks.inference.adapted import _side_by_side, load

    path = adapter(base, tmp_path)
    plain, _ = logits_and_answers(load(base, None, "float32"))
    expected, answers = logits_and_answers(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path))
    assert not torch.allclose(expected, plain, atol=0.1)
    merged = logits_and_answers(load(base, path, "float32"))
    beside = logits_and_answers(
        _side_by_side(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path))
    )
    for found, said in (merged, beside):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert said == answers


def test_in_bfloat16_it_is_as_near_to_the_truth_as_pefts_layers_are(base, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from tasks.inference.adapted import load

    path = adapter(base, tmp_path)

    def adapted(dtype):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        return PeftModel.from_pretrained(model, path, autocast_adapter_dtype=False)

    truth, _ = logits_and_answers(adapted(torch.float64))

    def error(model) -> float:
        return float((logits_and_answers(model)[0] - truth).norm() / truth.norm())

    ours, pefts = error(load(base, path, "bfloat16")), error(adapted(torch.bfloat16))
    assert ours < 1.1 * pefts < 0.1


def test_an_adapter_that_is_more_than_two_factors_is_refused_and_not_half_applied(base, tmp_path):
    from tasks.inference.adapted import load

    path = adapter(base, tmp_path, use_dora=True)
    with pytest.raises(ValueError, match=r"q_proj is no plain LoRA of a linear layer; use inference.precision=float32"):
        load(base, path, "bfloat16")
