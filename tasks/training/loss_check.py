"""Ends a run whose loss is no number, or grows: hours on a GPU do not make it well again."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch

NUM_STEPS_COMPARED = 10
"""The loss has diverged when its mean over this many steps ..."""
MAX_RISE_NATS = 2.0
"""... is this much above the mean over as many first steps: every token more than seven times less likely than at the start."""
NUM_ROWS_SHOWN = 32


class LossNotFinite(RuntimeError):
    """A loss that is NaN or infinite."""


class LossDiverged(RuntimeError):
    """A loss that rises instead of falling."""


@dataclass
class _Step:
    step: int
    losses: torch.Tensor
    rows: list[list[int]]
    copied: Any = None


@dataclass
class LossCheck:
    """Looks at the loss of every micro-batch of this rank, a step late.

    Late, because reading a number off a GPU waits for all work that is queued on it: the copy of one step's losses has
    long arrived when the next step has been queued.
    """

    rank: int
    _losses: list[torch.Tensor] = field(default_factory=list)
    _rows: list[list[int]] = field(default_factory=list)
    _waiting: _Step | None = None

    def add(self, loss: torch.Tensor, rows: list[int]) -> None:
        """The loss of a micro-batch (a scalar, on any device) and the rows it was made of."""
        self._losses.append(loss)
        self._rows.append(rows)

    def end_step(self, step: int) -> None:
        """Judge the step before, and begin to fetch the losses of this one.

        Raises:
            LossNotFinite: naming step and rows.
        """
        ended = _Step(step, torch.stack(self._losses), self._rows)
        self._losses, self._rows = [], []
        if ended.losses.is_cuda:
            ended.losses = ended.losses.to("cpu", non_blocking=True)
            ended.copied = torch.cuda.Event()
            ended.copied.record()
        self.finish()
        self._waiting = ended

    def finish(self) -> None:
        """Judge what has not been judged; before a checkpoint, so that none holds what came of it.

        Raises:
            LossNotFinite: naming step and rows.
        """
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        if waiting.copied is not None:
            waiting.copied.synchronize()
        for loss, rows in zip(waiting.losses.tolist(), waiting.rows, strict=True):
            if not math.isfinite(loss):
                raise LossNotFinite(
                    f"the loss of step {waiting.step} is {loss} on rank {self.rank}, for the rows {shown(rows)} of the training "
                    "file (counted from 0). Look at these rows; if they are well, lower training.learning_rate or "
                    "training.max_grad_norm. The newest checkpoint is from before"
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
