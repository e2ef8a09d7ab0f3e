"""Runs of seconds: a model of a few thousand weights that writes bytes, thirty-odd rows; a check that only looks around."""

from pathlib import Path

TOKENS = 260


def write_tiny_model(folder: Path) -> Path:
    """A Llama of two layers whose tokens are bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=TOKENS, bos_token_id=0, eos_token_id=1, max_position_embeddings=8192, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: index for index, letter in enumerate(letters, start=2)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def tiny_overrides(model: Path, storage: Path, *, epochs: int = 1) -> list[str]:
    """Assignments over finetune/demo; a model that never learns meets no gate, so none is checked."""
    gates = ("min_exact_match", "min_requests", "max_p_value", "min_abstention", "min_call_rate")
    return [
        f"model.name={model}",
        "model.family=generic",
        f"storage.shared={storage}",
        "storage.min_free_gbytes=0.5",
        "dataset.max_rows=36",
        "dataset.num_test_rows=10",
        "dataset.num_unseen_tools_rows=2",
        "dataset.max_length_tokens=8000",
        "dataset.num_workers=1",
        f"training.num_epochs={epochs}",
        "training.global_batch_size=4",
        "training.per_device_batch_size=2",
        "training.warmup_steps=0",
        "training.save_every_steps=2",
        "training.log_every_steps=1",
        "training.lora.first_layer=0",
        "inference.max_new_tokens=8",
        "pool.num_nodes=1",
        *(f"gates.{name}=null" for name in gates),
    ]


def tiny_check_overrides(storage: Path) -> list[str]:
    """Assignments over cluster-check/demo: one job, that of the inventory."""
    return [f"storage.shared={storage}", "storage.min_free_gbytes=0.5", "stages=[inventory]", "pool.num_nodes=1"]
