"""Batches that do not fit are halved, and nothing is asked twice or lost."""

import pytest
import torch

from tasks.contracts.conversation import Example, Message
from tasks.dataset.rendering.family import FAMILIES
from tasks.inference.generate import OutOfMemory, generate

END = 99


class Words:
    """A tokenizer of one token a letter, as far as generation needs one."""

    pad_token_id = 0

    def __call__(self, text, **_):
        return {"input_ids": [1] * len(text)}

    def convert_tokens_to_ids(self, token):
        return END

    def decode(self, ids, **_):
        return "." * len(ids)


class Small:
    """A model on a device that holds so many requests at a time."""

    device = torch.device("cpu")

    def __init__(self, room: int) -> None:
        self.room, self.sizes = room, []

    def generate(self, input_ids, **_):
        self.sizes.append(len(input_ids))
        if len(input_ids) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return torch.cat([input_ids, torch.full((len(input_ids), 1), END)], dim=1)


@pytest.fixture(autouse=True)
def its_own_way(monkeypatch):
    """The model of these tests generates by itself."""
    monkeypatch.setattr("tasks.inference.generate.has_fixed_cache", lambda model: False)


def examples(n: int) -> list[Example]:
    return [Example(f"{i:02d}", (Message("user", "q" * i),), (), (), "", "s", "test") for i in range(n)]


def answered(model: Small, n: int, batch_size: int, smaller: list[int]) -> list[str]:
    predictions = generate(
        model, Words(), FAMILIES["smollm2"], examples(n), batch_size=batch_size, max_new_tokens=4,
        on_smaller=smaller.append,
    )  # fmt: skip
    return sorted(p.example_id for p in predictions)


def test_a_batch_that_does_not_fit_is_halved_until_it_does_and_stays_so():
    model, smaller = Small(room=3), []
    assert answered(model, 10, 8, smaller) == [e.id for e in examples(10)]
    assert smaller == [4, 2]
    assert model.sizes == [8, 4, 2, 2, 2, 2, 2]


def test_a_single_request_that_does_not_fit_is_named():
    with pytest.raises(OutOfMemory, match="the request 02 of .* tokens does not fit into memory alone; lower"):
        answered(Small(room=0), 3, 2, [])


def test_another_error_is_no_want_of_memory():
    model = Small(room=9)
    model.generate = lambda **_: (_ for _ in ()).throw(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        answered(model, 3, 2, [])
