"""The loss curve and speed of a training run, as it runs."""

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks.contracts.attempt import Attempt
from tasks.training.plan import TrainingPlan

LOSS, SPEED = "train/loss", "train/tokens_per_s_per_gpu"
NAMES = {"loss": LOSS, "learning_rate": "train/learning_rate", "grad_norm": "train/grad_norm"}


class Reporter(TrainerCallback):
    """Logs every point to the attempt's metrics and says how far the run is. Padding is not counted as tokens."""

    def __init__(self, attempt: Attempt, plan: TrainingPlan) -> None:
        self._attempt = attempt
        self._plan = plan
        self._last = (0.0, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last = (time.perf_counter(), int(state.num_input_tokens_seen))
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
        seconds, new_tokens = now - self._last[0], tokens - self._last[1]
        self._last = (now, tokens)
        speed = new_tokens / seconds / self._plan.world_size
        metrics = {name: float(logs[key]) for key, name in NAMES.items() if key in logs}
        # The trainer sees all epochs as one, in the order that the plan gave them.
        epoch = state.global_step / self._plan.steps_per_epoch
        metrics |= {SPEED: speed, "train/epoch": epoch}
        self._attempt.log_metrics(state.global_step, metrics)
        left = (state.max_steps - state.global_step) * seconds / max(1, args.logging_steps)
        print(
            f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  "
            f"lr {logs.get('learning_rate', 0):.2e}  {speed:.0f} tokens/s/rank  about {left:.0f} s left"
        )

    def _progress(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            self._attempt.report_progress(state.global_step, state.max_steps, "steps")
