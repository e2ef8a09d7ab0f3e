"""Our text and loss held to the official templates and tokenizers, where an installed package carries them.

TRL carries the templates of Qwen and Llama; mistral-common Mistral's encoder and tokenizer, qwen-agent and llama-models
the tokenizers of Qwen and Llama. The last three are no dependencies: `pip install mistral-common sentencepiece tiktoken`
and `pip install --no-deps qwen-agent llama-models` let their tests run.
"""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from tasks.contracts.conversation import Call, Example, Message
from tasks.dataset.rendering.family import FAMILIES, encode_conversation, encode_prompt, family_for, prompt_text
from tests.dataset.test_rendering import EXAMPLE, PARALLEL

ROME, OSLO = (
    Call("get_weather", {"place": "Rome", "days": []}),
    Call("get_weather", {"place": 'the "Ö" {\n}', "n": 1.5}),
)
HARD = Message("user", 'Weather in "Zürich"?\n\nOr <b>Oslo</b>, & why {not}?')


def example(*messages: Message, tools: bool = True) -> Example:
    reply = messages[-1]
    return dataclasses.replace(
        EXAMPLE,
        messages=messages[:-1],
        tools=EXAMPLE.tools * 2 if tools else (),
        expected=reply.calls,
        answer=reply.content,
    )


CONVERSATIONS = {
    "several turns": EXAMPLE,
    "one call": example(HARD, Message("assistant", calls=(ROME,))),
    "parallel calls": example(Message("system", "Be brief."), HARD, Message("assistant", calls=(ROME, OSLO))),
    "words": example(Message("system", "Be brief."), HARD, Message("assistant", "None fits.")),
    "without tools": example(HARD, Message("assistant", "Hello!"), tools=False),
    "without tools, with a system message": example(
        Message("system", "Be brief."), HARD, Message("assistant", "Hello!"), tools=False
    ),
    "several requests without tools": example(
        HARD, Message("assistant", "Hello!"), HARD, Message("assistant", "Still here."), tools=False
    ),
    "results of parallel calls": example(*PARALLEL, Message("assistant", "18 and three.")),
    "a call after a result": example(
        HARD, Message("assistant", calls=(ROME,)), Message("tool", "18"), Message("assistant", calls=(OSLO,))
    ),
}


def carried(package: str, path: str) -> Path:
    """A file inside of a package, which is not imported for it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed; it carries {Path(path).name}")
    file = Path(spec.origin).parent / path
    if not file.exists():
        pytest.skip(f"the installed {package} does not carry {path}")
    return file


def as_openai(messages):
    """The messages as templates take them; calls are numbered within an answer."""
    rows, num_results = [], 0
    for message in messages:
        row = {"role": message.role, "content": message.content}
        if message.calls:
            row["tool_calls"] = [
                {
                    "type": "function",
                    "id": f"call{number:05}",
                    "function": {"name": call.name, "arguments": dict(call.arguments)},
                }
                for number, call in enumerate(message.calls, start=1)
            ]
        num_results = num_results + 1 if message.role == "tool" else 0
        if message.role == "tool":
            row["tool_call_id"] = f"call{num_results:05}"
        rows.append(row)
    return rows


def official(template: str, messages, tools, **options):
    """The text of a template that TRL carries, and the stretches that it marks as generated."""
    from transformers.utils.chat_template_utils import render_jinja_template

    text = carried("trl", f"chat_templates/{template}.jinja").read_text()
    marked = "endgeneration" in text
    (rendered,), spans = render_jinja_template(
        [as_openai(messages)],
        tools=[{"type": "function", "function": dict(tool)} for tool in tools] or None,
        chat_template=text,
        return_assistant_tokens_mask=marked,
        **options,
    )
    return rendered, [rendered[start:end] for start, end in spans[0]] if marked else None


def ours(name, example):
    family = FAMILIES[name]
    counted = [segment.text for segment in family.segments(example.messages, example.tools) if segment.is_answer]
    answer = family.answer(example.reply)
    return prompt_text(family, example), answer, [*counted, answer]


def stretches(decode, ids, is_answer):
    found, previous = [], False
    for token, counted in zip(ids, is_answer, strict=True):
        if counted and not previous:
            found.append([])
        if counted:
            found[-1].append(token)
        previous = counted
    return [decode(stretch) for stretch in found]


@pytest.mark.parametrize("case", CONVERSATIONS)
class TestTemplates:
    def test_qwen2_5(self, case):
        example = CONVERSATIONS[case]
        prompt, answer, _ = ours("qwen2_5", example)
        asked, _ = official("qwen2_5", example.messages, example.tools, add_generation_prompt=True)
        taught, _ = official("qwen2_5", [*example.messages, example.reply], example.tools)
        assert prompt == asked
        assert prompt + answer + "\n" == taught

    # TRL counts what stands around an answer as well: line breaks, and Qwen3's empty think block.
    @pytest.mark.parametrize(("family", "around"), [("qwen2_5", "\n{}\n"), ("qwen3", "<think>\n\n</think>\n\n{}\n")])
    def test_the_loss_is_that_of_trl_without_what_stands_around_an_answer(self, case, family, around):
        example = CONVERSATIONS[case]
        prompt, answer, counted = ours(family, example)
        taught, marked = official(f"{family}_training", [*example.messages, example.reply], example.tools)
        assert prompt + answer + "\n" == taught
        assert [around.format(text) for text in counted] == marked

    def test_qwen3_is_the_official_text_but_for_the_think_blocks_of_earlier_answers(self, case):
        example = CONVERSATIONS[case]
        prompt, answer, _ = ours("qwen3", example)
        options = {"add_generation_prompt": True, "enable_thinking": False}
        asked, _ = official("qwen3", example.messages, example.tools, **options)
        taught, _ = official("qwen3", [*example.messages, example.reply], example.tools)
        block = "<think>\n\n</think>\n\n"
        num_earlier = sum(message.role == "assistant" for message in example.messages)
        assert prompt.replace(block, "", num_earlier) == asked
        assert prompt.replace(block, "", num_earlier) + answer + "\n" == taught


# The official template refuses parallel calls, and says less without tools.
@pytest.mark.parametrize("case", ["one call", "words", "a call after a result"])
def test_llama3_is_the_official_text_but_for_a_space_and_quotes_around_results(case):
    example = CONVERSATIONS[case]
    prompt, answer, _ = ours("llama3", example)
    bos = {"bos_token": "<|begin_of_text|>"}
    asked, _ = official("llama3_1", example.messages, example.tools, add_generation_prompt=True, **bos)
    taught, _ = official("llama3_1", [*example.messages, example.reply], example.tools, **bos)
    for theirs, text in ((asked, prompt), (taught, prompt + answer)):
        theirs = theirs.replace("}.Do not use variables.", "}. Do not use variables.")
        for message in example.messages:
            if message.role == "tool":
                theirs = theirs.replace(f"\n\n{json.dumps(message.content)}<", f"\n\n{message.content}<")
        assert text == theirs


def tiktoken_of(name, path, pattern, first_special, specials):
    """A tokenizer as ``encode_conversation`` calls it, from a file of ranks."""
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed; it reads the tokenizer's file")
    from tiktoken.load import load_tiktoken_bpe

    encoding = tiktoken.Encoding(
        name,
        pat_str=pattern,
        mergeable_ranks=load_tiktoken_bpe(str(path)),
        special_tokens={token: first_special + i for i, token in enumerate(specials)},
    )
    return encoding, lambda text, add_special_tokens: {"input_ids": encoding.encode(text, allowed_special="all")}


def pattern(num_digits):
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + num_digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@pytest.mark.integration
class TestTokenizers:
    @pytest.mark.parametrize("name", ["qwen2", "qwen2_5", "qwen3"])
    def test_qwen(self, name):
        path = carried("qwen_agent", "utils/qwen.tiktoken")
        # Ids from Qwen2.5's and Qwen3's tokenizer_config.json; Qwen2 has the first three only.
        specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        if name != "qwen2":
            specials += [f"<|unused_{i}|>" for i in range(11)] + ["<tool_call>", "</tool_call>"]
        if name == "qwen3":
            specials += [f"<|other_{i}|>" for i in range(6)] + ["<tool_response>", "</tool_response>"]
            specials += ["<think>", "</think>"]
        encoding, tokenizer = tiktoken_of("qwen", path, pattern(""), 151643, specials)
        self.check(name, encoding, tokenizer)

    def test_llama3(self):
        path = carried("llama_models", "llama3/tokenizer.model")
        # The order that llama_models.llama3.tokenizer gives them.
        specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|r0|>", "<|r1|>", "<|finetune_right_pad_id|>"]
        specials += ["<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
        encoding, tokenizer = tiktoken_of("llama3", path, pattern("{1,3}"), 128000, specials)
        assert encoding.encode("<|eot_id|>", allowed_special="all") == [128009]
        self.check("llama3", encoding, tokenizer)

    @staticmethod
    def check(name, encoding, tokenizer):
        family = FAMILIES[name]
        assert len(tokenizer(family.end_of_turn, add_special_tokens=False)["input_ids"]) == 1
        for example in CONVERSATIONS.values():
            prompt, answer, counted = ours(name, example)
            ids, is_answer = encode_conversation(tokenizer, family, example)
            asked = encode_prompt(tokenizer, family, example)
            assert ids[: len(asked)] == asked
            assert stretches(encoding.decode, ids, is_answer) == counted
            # Text by text or in one piece: no token of these conversations reaches across a border.
            assert ids == encoding.encode(prompt + answer, allowed_special="all")


V3 = "data/mistral_instruct_tokenizer_240323.model.v3"


@pytest.fixture(scope="module")
def mistral_tokenizer(tmp_path_factory):
    path = carried("mistral_common", V3)
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed; it reads the tokenizer's file")
    from tasks.models.load import load_tokenizer

    folder = tmp_path_factory.mktemp("mistral")
    shutil.copy(path, folder / "tokenizer.model")
    kind = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return load_tokenizer(folder)


@pytest.mark.integration
class TestMistral:
    # With more requests than one, tools and system message stand elsewhere: see the family's docstring.
    @pytest.mark.parametrize("case", [case for case in CONVERSATIONS if case != "several turns"])
    def test_ids_are_those_of_mistral_common_where_there_is_one_request(self, mistral_tokenizer, case):
        from mistral_common.protocol.instruct.request import ChatCompletionRequest
        from mistral_common.protocol.instruct.validator import ValidationMode
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        example = CONVERSATIONS[case]
        messages = as_openai([*example.messages, example.reply])
        for message in messages:
            if "tool_calls" in message:
                del message["content"]
                for call in message["tool_calls"]:
                    call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        tools = [{"type": "function", "function": dict(tool)} for tool in example.tools] or None
        # Fine-tuning is the mode in which a conversation may end with an answer.
        encoder = MistralTokenizer.from_file(str(carried("mistral_common", V3)), mode=ValidationMode.finetuning)
        theirs = encoder.encode_chat_completion(ChatCompletionRequest.from_openai(messages, tools)).tokens

        family = FAMILIES["mistral"]
        ids, is_answer = encode_conversation(mistral_tokenizer, family, example)
        asked = encode_prompt(mistral_tokenizer, family, example)
        assert ids == theirs
        assert ids[: len(asked)] == asked
        # Decoded alone, words lose the space that SentencePiece begins every text with.
        counted = [text.lstrip() for text in ours("mistral", example)[2]]
        assert stretches(mistral_tokenizer.decode, ids, is_answer) == counted
        assert mistral_tokenizer.convert_tokens_to_ids(family.end_of_turn) == ids[-1]

    def test_generic_begins_and_ends_with_the_tokens_of_the_tokenizer(self, mistral_tokenizer):
        family = family_for("generic", mistral_tokenizer)
        ids, is_answer = encode_conversation(mistral_tokenizer, family, EXAMPLE)
        assert ids[0] == mistral_tokenizer.bos_token_id
        assert ids[-1] == mistral_tokenizer.eos_token_id
        assert ids.count(mistral_tokenizer.eos_token_id) == 3
        counted = stretches(mistral_tokenizer.decode, ids, is_answer)
        assert [family.parse(text.removesuffix("</s>")).calls for text in (counted[0], counted[2])] == [
            EXAMPLE.messages[2].calls,
            EXAMPLE.expected,
        ]

    def test_an_answer_is_read_after_control_tokens_were_dropped(self, mistral_tokenizer):
        ids = mistral_tokenizer(FAMILIES["mistral"].answer(EXAMPLE.reply), add_special_tokens=False)["input_ids"]
        text = mistral_tokenizer.decode(ids, skip_special_tokens=True)
        print(repr(text))
        assert FAMILIES["mistral"].parse(text).calls == EXAMPLE.expected
