"""The loss curve and speed of a training run, as it runs."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks.contracts.attempt import Attempt
from tasks.training.checkpoints import is_full_disk
from tasks.training.plan import TrainingPlan
from tasks.training.rank_report import RankReports

LOSS, SPEED, STEP = "train/loss", "train/tokens_per_s_per_gpu", "train/step_seconds"
WORK, MFU = "train/useful_tflops_per_s_per_gpu", "train/mfu"
FAILED_CHECKPOINTS = "train/failed_checkpoints"
NAMES = {"loss": LOSS, "learning_rate": "train/learning_rate", "grad_norm": "train/grad_norm"}


def say(text: str) -> None:
    """Print a line for people; one that finds no room on a full disk is lost, and training is not."""
    try:
        print(text, flush=True)
    except OSError as error:
        if not is_full_disk(error):
            raise


class Reporter(TrainerCallback):
    """Logs every point to the attempt's metrics and says how far the run is. Padding is not counted as tokens.

    Args:
        reports: what the ranks tell of themselves.
        failed_checkpoints: grows while training runs; how many are told with every point once there are any.

    Attributes:
        flops_per_token: useful operations of a token; 0: not known.
        peak_flops: floating-point operations a second that products reach on the chip, for MFU; 0: not known.
    """

    def __init__(
        self, attempt: Attempt, plan: TrainingPlan, reports: RankReports, failed_checkpoints: Sequence[str]
    ) -> None:
        self._attempt = attempt
        self._plan = plan
        self._reports = reports
        self._failed_checkpoints = failed_checkpoints
        self.flops_per_token, self.peak_flops = 0.0, 0.0
        self._last = (0.0, 0, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last = (time.perf_counter(), int(state.num_input_tokens_seen), state.global_step)
        self._progress(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._progress(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        now, tokens = time.perf_counter(), int(state.num_input_tokens_seen)
        seconds, new_tokens, new_steps = now - self._last[0], tokens - self._last[1], state.global_step - self._last[2]
        self._last = (now, tokens, state.global_step)
        speed = new_tokens / seconds / self._plan.world_size
        metrics = {name: float(logs[key]) for key, name in NAMES.items() if key in logs}
        # The trainer sees all epochs as one, in the order that the plan gave them.
        epoch = state.global_step / self._plan.steps_per_epoch
        of_ranks, words = self._reports.take()
        metrics |= {SPEED: speed, STEP: seconds / new_steps, "train/epoch": epoch, **of_ranks}
        if self.flops_per_token:
            metrics[WORK] = speed * self.flops_per_token / 1e12
        if self.peak_flops:
            metrics[MFU] = speed * self.flops_per_token / self.peak_flops
        if self._failed_checkpoints:
            metrics[FAILED_CHECKPOINTS] = len(self._failed_checkpoints)
        self._write(lambda: self._attempt.log_metrics(state.global_step, metrics))
        left = (state.max_steps - state.global_step) * seconds / new_steps
        say(
            f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  "
            f"lr {logs.get('learning_rate', 0):.2e}  {speed:.0f} tokens/s/rank  "
            + (f"MFU {metrics[MFU]:.0%}  " if MFU in metrics else "")
            + f"about {left:.0f} s left"
            + (f"  {words}" if words else "")
        )

    def _progress(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            self._write(lambda: self._attempt.report_progress(state.global_step, state.max_steps, "steps"))

    def _write(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if not is_full_disk(error):
                raise
            say(f"progress of this step is not recorded: {error}")
