"""The fast encoder: the very ids of the tokenizers library, whatever the text; where it cannot promise that, it steps back."""

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tasks.dataset.rendering.encode import Encoder, marked
from tasks.dataset.rendering.segment import Segment

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SMOLLM2 = "each digit, then GPT-2"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|im_end|>\n", "<tool_call>"]
CORPUS = [
    'The weather in Oslo is 12 degrees; {"name": "get_weather", "arguments": {"place": "Oslo", "days": 123456}}\n\n'
    * 3,
    "I'll say it's they've   many    spaces\t\ttabs\r\nlines\n\n\n  indented: def f(x): return x**2 # comment",
] * 5


def trained(pattern: str | None) -> Tokenizer:
    """A small tokenizer that cuts words as GPT-2 does, as SmolLM2, or by another family's pattern."""
    tokenizer = Tokenizer(models.BPE())
    as_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern is None:
        tokenizer.pre_tokenizer = as_gpt2
    elif pattern == SMOLLM2:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), as_gpt2])
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def encoder_of(tokenizer: Tokenizer, folder) -> Encoder:
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return Encoder(path)


@pytest.fixture(scope="module", params=[None, SMOLLM2, LLAMA3, QWEN], ids=["gpt2", "smollm2", "llama3", "qwen"])
def both(request, tmp_path_factory):
    tokenizer = trained(request.param)
    encoder = encoder_of(tokenizer, tmp_path_factory.mktemp("tokenizer"))
    assert encoder.is_fast
    return tokenizer, encoder


PIECES = [
    *SPECIAL,
    "word",
    " word",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "it's",
    "'LL",
    "123",
    "12345678",
    "{",
    '"',
    ": ",
    "é",
    "Ⅷ",
]
PIECES += ["\u00a0", "\x1c", "\u2028", "日本", "<|im_", "|>", "a", " ", ".", "...", "_", "-"]


@given(
    text=st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join), st.text(st.characters(max_codepoint=127)))
)
@settings(max_examples=300, deadline=None)
def test_any_text_has_the_librarys_ids(both, text):
    tokenizer, encoder = both
    assert encoder(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids


def test_long_text_of_everything_has_the_librarys_ids(both):
    tokenizer, encoder = both
    draw = random.Random(2)
    for _ in range(200):
        text = "".join(draw.choice(PIECES) for _ in range(300))
        assert encoder(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids


def test_every_short_run_of_signs_is_cut_as_the_library_cuts_it(both):
    tokenizer, encoder = both
    for signs in [*itertools.product(" \n\ta1'.A", repeat=5), *itertools.product(" a.é\u0301日\u2003\n", repeat=5)]:
        text = "".join(signs)
        assert encoder(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids, repr(text)


def test_answers_are_told_from_the_rest_whatever_the_ids(both):
    tokenizer, encoder = both
    segments = [Segment("!word", False), Segment("! word", True), Segment("", True), Segment("word", False)]
    ids, is_answer = marked(encoder.conversation(segments))
    parts = [tokenizer.encode(segment.text, add_special_tokens=False).ids for segment in segments]
    assert ids.tolist() == [id_ for part in parts for id_ in part]
    assert is_answer.tolist() == [
        segment.is_answer for segment, part in zip(segments, parts, strict=True) for _ in part
    ]


def test_a_file_that_cuts_or_pads_does_neither(tmp_path):
    tokenizer = trained(None)
    expected = tokenizer.encode("word " * 100, add_special_tokens=False).ids
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=500)
    assert encoder_of(tokenizer, tmp_path)("word " * 100).tolist() == expected


@pytest.mark.parametrize(
    "change", ["normalizer", "prefix", "flags", "digits", "no_bpe", "letters only", "group", "no_steps", "normalized"]
)
def test_a_tokenizer_that_does_more_is_left_to_the_library(change, tmp_path):
    tokenizer = trained(LLAMA3)
    match change:
        case "normalizer":
            tokenizer.normalizer = normalizers.Lowercase()
        case "prefix":
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        case "flags":
            tokenizer.add_special_tokens([AddedToken("<end>", lstrip=True)])
        case "digits":
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        case "no_bpe":
            tokenizer = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
            tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        case "letters only":
            tokenizer = trained(r"\p{L}+")
        case "group":
            tokenizer = trained(f"({LLAMA3})")
        case "no_steps":
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
        case "normalized":
            tokenizer.add_tokens([AddedToken("<end>", normalized=True)])
    encoder = encoder_of(tokenizer, tmp_path)
    assert not encoder.is_fast
    for text in ("Word  a <end> 12", "".join(PIECES)):
        assert encoder(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids


def test_a_difference_is_noticed(tmp_path):
    encoder = encoder_of(trained(None), tmp_path)
    encoder.check([Segment("word word", False)])
    encoder._ids["word"] = b"\0\0\0\0"
    with pytest.raises(RuntimeError, match="token ids differ from the tokenizer's own"):
        encoder.check([Segment("word, word", False)])


@pytest.mark.integration
def test_the_real_tokenizer_is_fast_and_the_same(embedded_model):
    tokenizer = Tokenizer.from_file(str(embedded_model / "tokenizer.json"))
    encoder = Encoder(embedded_model / "tokenizer.json")
    assert encoder.is_fast
    for text in [*CORPUS, "".join(PIECES), json.dumps({"a": [1.5, None, "é"]})]:
        assert encoder(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids
