"""Which family a model folder is read as, and which folders are refused."""

import json
import typing

import pytest

from tasks.contracts.settings import ModelSettings
from tasks.dataset.rendering.family import FAMILIES, FamilyName, detect_family


def model_folder(path, model_type, tokens, *, template=None, **config):
    (path / "config.json").write_text(json.dumps({"model_type": model_type, **config}))
    (path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": token} for token in tokens]}))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))
    return path


V3 = ["<s>", "</s>", "[INST]", "[TOOL_CALLS]"]


@pytest.mark.parametrize(
    ("family", "model_type", "tokens", "more"),
    [
        ("llama3", "llama", ["<|start_header_id|>"], {}),
        ("smollm2", "llama", ["<|im_start|>"], {}),
        ("qwen2", "qwen2", ["<|im_start|>"], {}),
        ("qwen2_5", "qwen2", ["<|im_start|>", "<tool_call>"], {}),
        ("qwen3", "qwen3", ["<|im_start|>", "<tool_call>", "<think>"], {"template": "{% if enable_thinking %}"}),
        ("qwen3", "qwen3_moe", ["<|im_start|>", "<tool_call>", "<think>"], {"template": "{% if enable_thinking %}"}),
        ("mistral", "mistral", V3, {"vocab_size": 32768}),
    ],
)
def test_a_family_is_detected(tmp_path, family, model_type, tokens, more):
    assert detect_family(model_folder(tmp_path, model_type, tokens, **more)) == family


def test_a_template_in_a_file_of_its_own_is_read(tmp_path):
    folder = model_folder(tmp_path, "qwen3", ["<|im_start|>", "<think>"])
    (folder / "chat_template.jinja").write_text("{% if enable_thinking %}")
    assert detect_family(folder) == "qwen3"


@pytest.mark.parametrize(
    ("model_type", "tokens", "more"),
    [
        pytest.param("mamba", [], {}, id="another architecture"),
        pytest.param("llama", [], {}, id="Llama 2"),
        pytest.param("qwen2", ["<|im_start|>", "<tool_call>", "<think>"], {}, id="QwQ"),
        pytest.param("qwen2", ["<think>", "<tool_call>"], {}, id="a Qwen2.5 that DeepSeek distilled into"),
        pytest.param("qwen3", ["<|im_start|>", "<tool_call>", "<think>"], {"template": "{{ x }}"}, id="Qwen3 2507"),
        pytest.param("mistral", ["<s>", "</s>"], {"vocab_size": 32000}, id="Mistral 7B v0.2"),
        pytest.param("mistral", V3, {"vocab_size": 131072}, id="Mistral Nemo"),
        pytest.param("mistral", [*V3, "[SYSTEM_PROMPT]"], {"vocab_size": 32768}, id="Mistral Large 2411"),
    ],
)
def test_a_model_of_no_known_family_is_refused(tmp_path, model_type, tokens, more):
    with pytest.raises(ValueError, match="set model.family to the one it was trained with"):
        detect_family(model_folder(tmp_path, model_type, tokens, **more))


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3", "gemma3_text", "gemma4"])
def test_gemma_is_refused_with_the_choice_that_is_left(tmp_path, model_type):
    with pytest.raises(ValueError, match="set model.family=generic"):
        detect_family(model_folder(tmp_path, model_type, ["<start_of_turn>", "<end_of_turn>"]))


def test_a_folder_with_a_configuration_only_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="set model.family"):
        detect_family(tmp_path)


def test_every_family_can_be_set():
    choices = typing.get_args(ModelSettings.model_fields["family"].annotation)
    assert set(choices) == {"auto", "generic", *FAMILIES} == {"auto", *typing.get_args(FamilyName)}
