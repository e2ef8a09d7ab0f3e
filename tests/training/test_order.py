"""In which order training sees its rows."""

import random

import pytest

from tasks.training.order import balanced, training_order

_draw = random.Random(1)
LENGTHS = [_draw.randint(20, 400) for _ in range(103)]


@pytest.mark.parametrize("batch", [1, 2, 8, 12, 32])
def test_an_epoch_takes_every_row_at_most_once_and_fills_its_batches(batch):
    steps = len(LENGTHS) // batch
    order = training_order(LENGTHS, global_batch_size=batch, steps_per_epoch=steps, num_epochs=3, seed=7)
    assert len(order) == 3 * steps * batch
    for epoch in range(3):
        rows = order[epoch * steps * batch : (epoch + 1) * steps * batch]
        assert len(set(rows)) == steps * batch


def test_the_order_follows_from_the_seed_and_differs_between_epochs():
    plan = {"global_batch_size": 2, "steps_per_epoch": 51, "num_epochs": 2}
    order = training_order(LENGTHS, **plan, seed=7)
    assert order == training_order(LENGTHS, **plan, seed=7)
    assert order != training_order(LENGTHS, **plan, seed=8)
    assert order[:102] != order[102:]
    # The row that finds no place is another one each time, over enough epochs.
    many = training_order(LENGTHS, global_batch_size=2, steps_per_epoch=51, num_epochs=400, seed=7)
    assert set(many) == set(range(103))


def test_ranks_that_work_side_by_side_get_conversations_of_like_length():
    order = training_order(LENGTHS, global_batch_size=2, steps_per_epoch=51, num_epochs=1, seed=7)

    def waited(rows):
        pairs = [(LENGTHS[a], LENGTHS[b]) for a, b in zip(rows[::2], rows[1::2], strict=True)]
        return sum(2 * max(pair) for pair in pairs) / sum(map(sum, pairs)) - 1

    assert waited(order) < 0.05 < waited(range(102))
    # Their batches come in no order of length: the first half is not the short one.
    halves = [sum(LENGTHS[row] for row in half) for half in (order[:51], order[51:])]
    assert max(halves) / min(halves) < 1.3


def test_a_large_batch_is_made_of_several_lengths():
    order = training_order(LENGTHS, global_batch_size=32, steps_per_epoch=3, num_epochs=1, seed=7)
    spread = [max(LENGTHS[row] for row in order[i : i + 32]) - min(LENGTHS[row] for row in order[i : i + 32])
              for i in (0, 32, 64)]  # fmt: skip
    assert min(spread) > 100


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_packed_micro_batches_of_a_step_hold_about_as_many_tokens_each(size):
    lengths = [min(4096, int(_draw.lognormvariate(6.0, 0.9))) for _ in range(480)]
    order = training_order(lengths, global_batch_size=24, steps_per_epoch=20, num_epochs=1, seed=7)
    shared = balanced(order, lengths, global_batch_size=24, micro_batch_size=size)
    steps = [(sorted(order[i : i + 24]), sorted(shared[i : i + 24])) for i in range(0, 480, 24)]
    assert all(before == after for before, after in steps)

    def fullest(rows):
        """Of each step, the tokens of its fullest micro-batch, as multiples of their mean."""
        found = [
            [sum(lengths[row] for row in rows[j : j + size]) for j in range(i, i + 24, size)] for i in range(0, 480, 24)
        ]
        return sum(max(step) / (sum(step) / len(step)) for step in found) / len(found)

    # Of the longest row alone nothing can be shared out.
    assert fullest(shared) < (1.15 if size >= 3 else 1.3 if size == 2 else fullest(order) + 1e-9)
    assert size == 1 or fullest(shared) < fullest(order) - 0.2
