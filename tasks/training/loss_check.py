"""Ends a run whose loss or gradient is no number, or whose loss grows: hours on a GPU do not make it well again."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch

from tasks.training.ranks import Ranks
from tasks.training.stop_request import leave_silently

NUM_STEPS_COMPARED = 10
"""The loss has diverged when its mean over this many steps ..."""
MAX_RISE_NATS = 2.0
"""... is this much above the mean over as many first steps: every token more than seven times less likely than at the start."""
NUM_ROWS_SHOWN = 32
NOT_FINITE = ("nan", "inf", "-inf")


class LossNotFinite(RuntimeError):
    """A loss that is NaN or infinite."""


class GradientNotFinite(RuntimeError):
    """A gradient that is NaN or infinite, of losses that are not: something overflowed on the way back."""


class LossDiverged(RuntimeError):
    """A loss that rises instead of falling."""


@dataclass
class _Step:
    step: int
    numbers: torch.Tensor
    rows: list[list[int]]
    rows_of_all: Sequence[int]
    copied: Any = None


@dataclass
class LossCheck:
    """Looks at the loss of every micro-batch of this rank and at the gradient of the global batch, a step late.

    Late, because reading a number off a GPU waits for all work that is queued on it: the copy of one step's numbers has
    long arrived when the next step has been queued.
    """

    ranks: Ranks
    _losses: list[torch.Tensor] = field(default_factory=list)
    _rows: list[list[int]] = field(default_factory=list)
    _norm: torch.Tensor | float | None = None
    _waiting: _Step | None = None

    def add(self, loss: torch.Tensor, rows: list[int]) -> None:
        """The loss of a micro-batch (a scalar, on any device) and the rows it was made of."""
        self._losses.append(loss)
        self._rows.append(rows)

    def add_gradient(self, norm: torch.Tensor | float) -> None:
        """The norm of the step's gradient, the same on all ranks (a scalar, on any device)."""
        self._norm = norm

    def end_step(self, step: int, rows: Sequence[int]) -> None:
        """Judge the step before, and begin to fetch the numbers of this one.

        Args:
            rows: of the global batch.

        Raises:
            LossNotFinite, GradientNotFinite: as :meth:`finish`.
        """
        assert self._norm is not None, "the trainer told no norm of this gradient"
        norm = torch.as_tensor(self._norm).to(self._losses[0])
        ended = _Step(step, torch.stack([*self._losses, norm]), self._rows, rows)
        self._losses, self._rows, self._norm = [], [], None
        if ended.numbers.is_cuda:
            ended.numbers = ended.numbers.to("cpu", non_blocking=True)
            ended.copied = torch.cuda.Event()
            ended.copied.record()
        self.finish()
        self._waiting = ended

    def finish(self) -> None:
        """Judge what has not been judged; before a checkpoint, so that none holds what came of it. All ranks must.

        Raises:
            LossNotFinite: on rank 0, naming step, rank and rows; the other ranks leave. (By itself, with a gradient that is a
                number all the same, on the rank whose loss it is.)
            GradientNotFinite: on rank 0, where all losses are numbers.
        """
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        if waiting.copied is not None:
            waiting.copied.synchronize()
        *losses, norm = waiting.numbers.tolist()
        bad = next((pair for pair in zip(losses, waiting.rows, strict=True) if not math.isfinite(pair[0])), None)
        if math.isfinite(norm):
            if bad is not None:
                raise _loss_not_finite(waiting.step, self.ranks.rank, *bad)
            return
        # Known to every rank alike, whoever it comes from. Rank 0 tells: it may have a checkpoint to write to its end.
        loss, rows = bad or (0.0, waiting.rows[0])
        told = self.ranks.gather([NOT_FINITE.index(str(loss)) if bad else -1, *rows]).wait()
        if self.ranks.rank != 0:
            leave_silently()
        for rank, (number, *its_rows) in enumerate(told):
            if number >= 0:
                raise _loss_not_finite(waiting.step, rank, float(NOT_FINITE[number]), its_rows)
        raise GradientNotFinite(
            f"the gradient of step {waiting.step} is no finite number (its norm is {norm}), though all its losses are, for "
            f"the rows {shown(waiting.rows_of_all)} of the training file (counted from 0): something overflowed on the way "
            "back. Look at these rows; if they are well, lower training.learning_rate, or, in bfloat16, see whether it is the "
            "precision (training.precision=float32). The newest checkpoint is from before"
        )


def _loss_not_finite(step: int, rank: int, loss: float, rows: Sequence[int]) -> LossNotFinite:
    return LossNotFinite(
        f"the loss of step {step} is {loss} on rank {rank}, for the rows {shown(rows)} of the training file (counted from 0). "
        "Look at these rows; if they are well, lower training.learning_rate or training.max_grad_norm. The newest checkpoint "
        "is from before"
    )


def check_divergence(
    points: Sequence[Mapping[str, Any]], *, log_every_steps: int, recent: Mapping[int, Sequence[int]]
) -> None:
    """Compare the last points of the loss curve with the first.

    Args:
        points: transformers' ``log_history``; those with a ``loss`` count, in nats per token.
        recent: rows of the last steps.

    Raises:
        LossDiverged: with both means, the steps and their rows.
    """
    curve = [point for point in points if "loss" in point]
    num = math.ceil(NUM_STEPS_COMPARED / log_every_steps)
    if len(curve) < 2 * num:
        return
    first, last = mean(p["loss"] for p in curve[:num]), mean(p["loss"] for p in curve[-num:])
    if last > first + MAX_RISE_NATS:
        rows = [row for step in recent for row in recent[step]]
        raise LossDiverged(
            f"the loss diverges: {last:.2f} nats per token over the steps {curve[-num]['step']} to {curve[-1]['step']}, "
            f"{first:.2f} over the first ones (more than {MAX_RISE_NATS:g} above). Last rows: {shown(rows)}. Lower "
            "training.learning_rate, or warm up longer (training.warmup_steps)"
        )


def shown(rows: Sequence[int]) -> str:
    """Row numbers for a message."""
    more = f" and {len(rows) - NUM_ROWS_SHOWN} more (see the ledger)" if len(rows) > NUM_ROWS_SHOWN else ""
    return ", ".join(map(str, rows[:NUM_ROWS_SHOWN])) + more
