"""Greedy answers do not depend on what else is in the batch."""

import math
from contextlib import nullcontext

import pytest
import torch

pytestmark = pytest.mark.integration

PROMPTS = ("Hello", "The capital of France is", "One, two, three, four, five, six, seven,")
MAX_NEW_TOKENS = 16


@pytest.fixture(scope="module")
def model(embedded_model):
    from tasks.models.load import load_model

    return load_model(embedded_model, "float32").eval()


@pytest.fixture(scope="module")
def tokenizer(embedded_model):
    from tasks.models.load import load_tokenizer

    return load_tokenizer(embedded_model)


def cut(answer: list[int], end: int) -> list[int]:
    return answer[: answer.index(end) + 1] if end in answer else answer


def test_a_padded_batch_answers_as_each_prompt_does_alone(model, tokenizer):
    from tasks.inference.generate import _answer

    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    expected = [
        model.generate(torch.tensor([p]), max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=-1)[0, len(p) :]
        for p in prompts
    ]
    # A token of the first answer ends it early, while the others go on.
    end = expected[0].tolist()[3]
    answers = _answer(model, tokenizer.pad_token_id, prompts, end, MAX_NEW_TOKENS)
    assert len(cut(answers[0], end)) < MAX_NEW_TOKENS
    assert [cut(a, end) for a in answers] == [cut(e.tolist(), end) for e in expected]


@pytest.mark.parametrize("tokens_at_once", [1, 8, 1000])
def test_steps_over_a_cache_of_fixed_size_answer_as_generate_does(model, tokenizer, monkeypatch, tokens_at_once):
    """On a GPU each step is one CUDA graph; what is in it is the same here."""
    from tasks.inference import fixed_cache
    from tasks.inference.fixed_cache import FixedCacheDecoder
    from tasks.inference.generate import _answer

    # One prompt at a time, two together, all together.
    monkeypatch.setattr(fixed_cache, "TOKENS_AT_ONCE", tokens_at_once)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    pad, end = tokenizer.pad_token_id, 198
    expected = [_answer(model, pad, [prompt], end, MAX_NEW_TOKENS)[0] for prompt in prompts]
    decoder = FixedCacheDecoder(
        model, end=end, pad=pad, batch_size=2, max_prompt_tokens=max(map(len, prompts)), max_new_tokens=MAX_NEW_TOKENS
    )
    # Two, then one: what an earlier batch left in the cache is not seen, nor the row that fills the batch up.
    answers = decoder.answer(prompts[:2]) + decoder.answer(prompts[2:])
    assert [cut(a, end) for a in answers] == [cut(e, end) for e in expected]
    assert {end in answer for answer in expected} == {True, False}
    with pytest.raises(ValueError, match="3 prompts"):
        decoder.answer(prompts)


@pytest.mark.parametrize("tokens_at_once", [1, 1000])
def test_expected_answers_read_behind_their_prompts_have_the_loss_of_a_pass_of_their_own_and_change_nothing(
    model, tokenizer, monkeypatch, tokens_at_once
):
    from tasks.inference import fixed_cache

    monkeypatch.setattr(fixed_cache, "TOKENS_AT_ONCE", tokens_at_once)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    references = [tokenizer(text)["input_ids"] for text in (" there, how are you?", "", " eight")]
    decoder = fixed_cache.FixedCacheDecoder(
        model, end=198, pad=tokenizer.pad_token_id, batch_size=4, max_prompt_tokens=max(map(len, prompts)),
        max_new_tokens=MAX_NEW_TOKENS,
    )  # fmt: skip
    alone = decoder.answer(prompts)
    assert decoder.nats == [0, 0, 0]
    assert decoder.answer(prompts, references) == alone
    for prompt, given, nats in zip(prompts, references, decoder.nats, strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + given])).logits[0, len(prompt) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(given, dtype=torch.long), reduction="sum")
        assert nats == pytest.approx(float(expected), rel=1e-4)
    assert decoder.nats[0] > decoder.nats[1] == 0 < decoder.nats[2]


@pytest.mark.parametrize(
    ("name", "is_taken"), [("LlamaConfig", True), ("StableLmConfig", False), ("NemotronConfig", False)]
)
def test_models_whose_layers_do_not_take_packed_prompts_are_left_to_generate(name, is_taken):
    import transformers

    from tasks.inference.fixed_cache import has_fixed_cache

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = getattr(transformers, name)(**sizes, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with nullcontext() if is_taken else pytest.warns(match="does not take packed prompts .* which is slower"):
        assert has_fixed_cache(model) == is_taken


def test_rows_whose_answers_have_ended_are_let_go_of_and_the_next_batch_is_whole_again(model, tokenizer, monkeypatch):
    from tasks.inference.fixed_cache import FixedCacheDecoder
    from tasks.inference.generate import _answer

    prompts = [tokenizer(text)["input_ids"] for text in (*PROMPTS, "One, two, three,")]
    pad, end = tokenizer.pad_token_id, 198
    expected = [cut(answer, end) for answer in _answer(model, pad, prompts, end, MAX_NEW_TOKENS)]
    ends = [len(answer) for answer in expected]
    assert min(ends) + 2 < max(ends)
    widths = []
    step = FixedCacheDecoder._step
    monkeypatch.setattr(FixedCacheDecoder, "_step", lambda self: (widths.append(len(self._token)), step(self)))
    decoder = FixedCacheDecoder(
        model, end=end, pad=pad, batch_size=4, max_prompt_tokens=max(map(len, prompts)), max_new_tokens=MAX_NEW_TOKENS
    )
    for order in (prompts, prompts[::-1]):
        widths.clear()
        assert [cut(answer, end) for answer in decoder.answer(order)] == (
            expected if order is prompts else expected[::-1]
        )
        assert widths[0] == 4 > widths[-1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["LlamaConfig", "Qwen3Config"])
def test_a_graph_of_a_step_answers_as_generate_does(name):
    """In float32, where rounding decides nothing; lengths are apart."""
    import transformers

    from tasks.inference import fixed_cache
    from tasks.inference.generate import _answer

    torch.manual_seed(1)
    config = getattr(transformers, name)(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=4096, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).to("cuda").eval()
    assert fixed_cache.has_fixed_cache(model)
    prompts = [torch.randint(1, 512, (length,)).tolist() for length in (1100, 300, 17, 2, 1)]
    expected = _answer(model, 0, prompts, 511, 40)
    decoder = fixed_cache.FixedCacheDecoder(
        model, end=511, pad=0, batch_size=len(prompts), max_prompt_tokens=1100, max_new_tokens=40
    )
    for part in (prompts, prompts[3:], prompts):
        answers = decoder.answer(part)
        assert [cut(a, 511) for a in answers] == [cut(e, 511) for e in expected[len(prompts) - len(part) :]]


def test_shorter_prompts_get_a_cache_of_their_own_and_the_same_answers(model, tokenizer, monkeypatch):
    from tasks.dataset.rendering.family import FAMILIES
    from tasks.inference import generate as engine
    from tasks.inference.fixed_cache import FixedCacheDecoder
    from tasks.inference.losses import plain_conversations

    examples = sorted(plain_conversations(), key=lambda example: len(str(example.messages)))
    examples = [examples[0], examples[1], examples[-1]]

    def answers():
        found = engine.generate(
            model, tokenizer, FAMILIES["smollm2"], examples, batch_size=1, max_new_tokens=4
        )  # fmt: skip
        return {answer.example_id: answer.text for answer in found}

    made = []

    def decoder(*args, **settings):
        made.append(settings["max_prompt_tokens"])
        return FixedCacheDecoder(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "has_fixed_cache", lambda model: False)
        expected = answers()
    monkeypatch.setattr(engine, "FixedCacheDecoder", decoder)
    assert answers() == expected
    assert 2 <= len(made) <= 3
    assert made == sorted(made, reverse=True)
    assert made[-1] + 4 <= engine.WORTH_A_NEW_CACHE * (made[0] + 4)


def drawn(model, tokenizer, examples, batch_size, seed=7):
    from tasks.dataset.rendering.family import FAMILIES
    from tasks.inference.generate import generate

    answers = generate(
        model,
        tokenizer,
        FAMILIES["smollm2"],
        examples,
        batch_size=batch_size,
        max_new_tokens=6,
        temperature=1.0,
        seed=seed,
    )
    return {answer.example_id: answer.text for answer in answers}


def test_a_drawn_answer_is_the_same_in_any_batch_and_another_with_another_seed(model, tokenizer):
    from tasks.inference.losses import plain_conversations

    examples = plain_conversations()[:3]
    together = drawn(model, tokenizer, examples, 3)
    assert together == drawn(model, tokenizer, examples[::-1], 1)
    assert together != drawn(model, tokenizer, examples, 3, seed=8)


def test_draws_follow_the_softmax_of_the_scores():
    import torch

    from tasks.inference.sampling import SeededSampling

    scores = torch.tensor([0.0, 1.0, 3.0])
    expected = (scores / 0.5).softmax(0)
    draw = SeededSampling([str(n) for n in range(4000)], 0.5, 7, torch.device("cpu"))
    counts = draw(None, scores.expand(4000, 3)).argmax(1).bincount(minlength=3)
    # Five standard deviations of a share of 4,000 draws.
    deviation = (expected * (1 - expected) / 4000).sqrt()
    assert ((counts / 4000 - expected).abs() <= 5 * deviation).all()


def test_the_loss_of_an_answer_is_the_models_own(model, tokenizer):
    import torch

    from tasks.dataset.rendering.family import FAMILIES, encode_prompt
    from tasks.inference.losses import answer_loss, plain_conversations

    family, rows = FAMILIES["smollm2"], plain_conversations()
    assert len(rows) == len({row.request for row in rows}) >= 20
    total = answer_loss(model, tokenizer, family, rows[:3])
    nats = 0.0
    for row in rows[:3]:
        prompt = encode_prompt(tokenizer, family, row)
        answer = tokenizer(family.answer(row.reply), add_special_tokens=False)["input_ids"]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            nats += float(model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss) * len(answer)
    assert total.nats == pytest.approx(nats, rel=1e-4)
    # An instruct model foretells such answers: far better than a guess among all tokens.
    assert total.mean < math.log(len(tokenizer)) / 2
