"""A loss that ends the run names its rows; one that only wobbles does not end it."""

from types import SimpleNamespace

import pytest
import torch

from tasks.training.loss_check import GradientNotFinite, LossCheck, LossDiverged, LossNotFinite, check_divergence


def ranks(rank: int = 0, *others: list[int]) -> SimpleNamespace:
    """This rank before others, which tell what is given."""
    return SimpleNamespace(rank=rank, gather=lambda values: SimpleNamespace(wait=lambda: [values, *others]))


@pytest.fixture(autouse=True)
def _nobody_leaves(monkeypatch):
    monkeypatch.setattr("tasks.training.loss_check.leave_silently", lambda: pytest.fail("left"))


def test_a_loss_that_is_no_number_names_its_step_and_its_rows_only():
    check = LossCheck(ranks(1))
    check.add(torch.tensor(1.0), [3, 4])
    check.add(torch.tensor(float("nan")), [5, 6])
    check.add_gradient(torch.tensor(1.0))
    check.end_step(7, [1, 2, 3, 4, 5, 6])
    with pytest.raises(LossNotFinite, match="step 7 is nan on rank 1, for the rows 5, 6 of"):
        check.finish()
    check.finish()


def test_a_step_is_judged_before_the_next_is_forgotten():
    check = LossCheck(ranks())
    check.add(torch.tensor(float("inf")), [1])
    check.add_gradient(1.0)
    check.end_step(1, [1])
    check.add(torch.tensor(1.0), [2])
    check.add_gradient(1.0)
    with pytest.raises(LossNotFinite, match="step 1 is inf"):
        check.end_step(2, [2])


@pytest.mark.parametrize("norm", [float("nan"), torch.tensor(float("inf"))], ids=str)
def test_a_gradient_that_is_no_number_is_told_with_the_rows_of_all_ranks(norm):
    check = LossCheck(ranks(0, [-1, 2]))
    check.add(torch.tensor(1.0), [3])
    check.add_gradient(norm)
    check.end_step(4, [2, 3])
    with pytest.raises(GradientNotFinite, match=r"gradient of step 4 .* for the rows 2, 3 of"):
        check.finish()


def test_a_step_has_a_gradient_of_its_own():
    check = LossCheck(ranks())
    check.add(torch.tensor(1.0), [3])
    check.add_gradient(1.0)
    check.end_step(4, [3])
    check.add(torch.tensor(1.0), [4])
    with pytest.raises(AssertionError):
        check.end_step(5, [4])


@pytest.mark.parametrize(("number", "loss"), [(0, "nan"), (1, "inf"), (2, "-inf")])
def test_of_a_loss_and_a_gradient_that_are_no_numbers_rank_0_tells_the_loss_whosever_it_is(number, loss):
    check = LossCheck(ranks(0, [-1, 8], [number, 9]))
    check.add(torch.tensor(1.0), [7])
    check.add_gradient(float("nan"))
    check.end_step(4, [7, 8, 9])
    with pytest.raises(LossNotFinite, match=f"step 4 is {loss} on rank 2, for the rows 9 of"):
        check.finish()


def test_the_other_ranks_leave(monkeypatch):
    check = LossCheck(ranks(1, [-1, 8]))
    check.add(torch.tensor(float("-inf")), [7])
    check.add_gradient(float("nan"))
    check.end_step(4, [7, 8])

    class Left(Exception):
        pass

    def leave():
        raise Left

    monkeypatch.setattr("tasks.training.loss_check.leave_silently", leave)
    with pytest.raises(Left):
        check.finish()


@pytest.mark.parametrize("every", [1, 5, 10])
def test_a_rising_loss_ends_the_run_and_a_wobbling_one_does_not(every):
    def curve(*losses):
        points = [{"loss": loss, "step": step} for step, loss in enumerate(losses, 1) if step % every == 0]
        return [{"train_runtime": 1.0}, *points]

    wobbling = [2.0, 3.5] * 20
    check_divergence(curve(*wobbling), log_every_steps=every, recent={})
    with pytest.raises(LossDiverged, match=r"diverges: 5\.00 nats .* Last rows: 8, 9"):
        check_divergence(curve(*[2.5] * 20, *[5.0] * 10), log_every_steps=every, recent={30: [8, 9]})
