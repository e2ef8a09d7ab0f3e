"""TRL's trainer, made to survive: checkpoints of ours, a ledger of rows, and one decision to stop for all ranks.

The trainer's loop stays transformers'. Its own checkpoints are replaced because they are pickles, are not atomic, and hold
random numbers per rank; here nothing depends on the number of ranks:

* The data position is the step: rows lie in the order of the steps, whatever the number of ranks (``order.py``), and the
  loader skips by index.
* Random numbers are not kept but made: each micro-batch seeds them from the seed, the step and its place in the global
  batch. Dropout is then the same after a restart, and on another number of ranks with the same micro-batch, as long as the
  same layers are compiled.
* The loss since the last logged point goes along, so that the curve of a resumed run has no seam.
"""

import copy
import dataclasses
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from tasks.contracts.files import read_json
from tasks.hardware.telemetry import Sampler
from tasks.training.adapter import trained_weights
from tasks.training.checkpoint_writer import CheckpointWriter
from tasks.training.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS, OPTIMIZER, STATE, TRAINER_STATE, Snapshot
from tasks.training.copy_off import CopyOff
from tasks.training.ledger import Ledger
from tasks.training.loss_check import NUM_STEPS_COMPARED, LossCheck, LossDiverged, check_divergence
from tasks.training.rank_report import RankClock, RankReport, RankReports
from tasks.training.ranks import Gathering, Ranks
from tasks.training.stop_request import StopRequest, leave_silently
from tasks.training.watchdog import Watchdog

ROW = "row"
"""Column of the training data: the row's number in the training file."""


class Elastic(SFTTrainer):
    """A mixin before :class:`~trl.SFTTrainer` or a subclass of it.

    Args:
        lengths: tokens of each row, by its number.
        reports: gets what the ranks tell of each step.
        gpu: samples this rank's GPU.

    Attributes:
        is_preempted: training ended because a rank was told to go.
    """

    data_collator: Any

    def __init__(
        self,
        *args: Any,
        ranks: Ranks,
        watchdog: Watchdog,
        stop: StopRequest,
        say: Callable[[str], None],
        lengths: Sequence[int],
        reports: RankReports,
        gpu: Sampler,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._lengths = lengths
        self._reports = reports
        self._clock = RankClock(local_rank=self.args.local_process_index, gpu=gpu)
        self.ranks, self.watchdog, self.stop, self.say = ranks, watchdog, stop, say
        self.is_preempted = False
        self.writer: CheckpointWriter | None = None
        self.ledger: Ledger | None = None
        self._micro_batch = 0
        self._source: tuple[Iterator[Any], int, torch.device] | None = None
        self._ahead: Any = None
        self._rows: list[list[int]] = []
        self._recent: dict[int, list[int]] = {}
        self._gathering: Gathering | None = None
        self._losses = LossCheck(ranks)
        self._restored: Mapping[str, Any] | None = None
        self._saved_step = 0
        self._copy_off = CopyOff()
        self.data_collator = _KeepRows(self.data_collator)
        self.add_callback(_StepEnd(self))

    def record_to(self, writer: CheckpointWriter, ledger: Ledger) -> None:
        """On rank 0, before training: who writes, out of which memory."""
        self.writer, self.ledger = writer, ledger
        # AdamW's two moments are as large as what is trained.
        self._copy_off.reserve(trained_weights(self.model), times=3)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one step; their rows and this rank's wish to stop begin their way to all ranks."""
        source = epoch_iterator, num_batches, device
        ahead, self._ahead = self._ahead, None
        # All steps are of one length, out of one iterator: transformers takes all epochs for one.
        assert ahead is None or self._source == source
        batches, num_items = ahead or self._read_step(*source)
        self._source = source
        self._rows = [batch.pop(ROW) for batch in batches]
        self._micro_batch = 0
        # Begun here and awaited when the step is over: the ranks agree on every step and it costs no time. A signal that
        # comes during a step ends the run after the next.
        report = self._clock.report(self.stop.signal or 0)
        self._gathering = self.ranks.gather([*report.numbers(), *(row for rows in self._rows for row in rows)])
        self._clock.begin(sum(self._lengths[row] for rows in self._rows for row in rows))
        return batches, num_items

    def _read_step(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        self.watchdog.at(f"step {self.state.global_step + 1}, reading its rows")
        return super().get_batch_samples(self._clock.waiting(epoch_iterator), num_batches, device)

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one micro-batch, with random numbers of its own."""
        step, index = self.state.global_step + 1, self._micro_batch
        self.watchdog.at(f"step {step}, forward pass of micro-batch {index + 1}")
        place = index * self.ranks.world_size + self.ranks.rank
        torch.manual_seed(seed_of(self.args.seed, step, place))
        loss: torch.Tensor = super().training_step(model, *args, **kwargs)
        self._let_train_be_brief(model)
        self._losses.add(loss, self._rows[index])
        self._micro_batch += 1
        return loss

    def _let_train_be_brief(self, model: torch.nn.Module) -> None:
        """Once it has been called, ``model.train()`` does nothing where the model, and what wraps it, is in training.

        transformers calls it at every micro-batch, and it goes through all modules: 9 ms of 32 layers with adapters, in which a
        GPU that has just told a point of the curve has nothing to do. The first call has to: what wraps a model is in training
        from its making, and the model in it is not.
        """
        if "train" in vars(model):
            return
        wrapped: torch.nn.Module = self.model

        def train(mode: bool = True) -> torch.nn.Module:
            return model if mode == model.training == wrapped.training else type(model).train(model, mode)

        vars(model)["train"] = train

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss as the class behind this one computes it."""
        loss = super().compute_loss(*args, **kwargs)
        if self._micro_batch + 1 == len(self._rows):
            self._clock.end()
        self.watchdog.at(f"step {self.state.global_step + 1}, backward pass of micro-batch {self._micro_batch + 1}")
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """Of the global batch, before it is clipped; looked at with the losses."""
        norm = super()._get_grad_norm(*args, **kwargs)
        self._losses.add_gradient(norm)
        return norm

    def end_step(self, control: TrainerControl) -> None:
        """After the optimiser's step: what was used, and whether to go on."""
        step, gathering = self.state.global_step, self._gathering
        assert gathering is not None
        self.watchdog.at(f"step {step}, waiting for all ranks to end it")
        reports, parts = zip(*map(RankReport.read, gathering.wait()), strict=True)
        if self.ranks.rank == 0:
            self._reports.add(reports)
        size = self.args.per_device_train_batch_size
        rows = [row for at in range(0, len(parts[0]), size) for part in parts for row in part[at : at + size]]
        # Padding is none of them; on a GPU a count of its own would have to be waited for.
        self.state.num_input_tokens_seen += sum(self._lengths[row] for row in rows)
        self._recent[step] = rows
        self._recent.pop(step - NUM_STEPS_COMPARED, None)
        self._losses.end_step(step, rows)
        if self.ledger is not None and self.writer is not None:
            self.ledger.record(step, rows)
            self.writer.check()
        asked = {rank: report.signal for rank, report in enumerate(reports) if report.signal}
        if asked and step < self.state.max_steps:
            self.is_preempted = True
            control.should_save = control.should_training_stop = True
            if self.ranks.rank == 0:
                rank, number = next(iter(asked.items()))
                self.say(f"signal {number} reached rank {rank}: all ranks save after step {step} and leave")
        if not control.should_training_stop:
            # While a GPU still has the step to do; a point of the curve is waited for next, and then it would have nothing.
            assert self._source is not None
            self._ahead = self._read_step(*self._source)
            self.watchdog.at(f"step {step}, waiting for its end on the device")

    def check_curve(self) -> None:
        """After a logged point, the same on all ranks.

        Raises:
            LossDiverged: on rank 0; the others leave.
        """
        try:
            check_divergence(self.state.log_history, log_every_steps=self.args.logging_steps, recent=self._recent)
        except LossDiverged:
            if self.ranks.rank != 0:
                leave_silently()
            raise

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Copy the state off and let it be written beside training."""
        began = time.perf_counter()
        step = self.state.global_step
        self.watchdog.at(f"step {step}, gathering the checkpoint")
        self._losses.finish()
        since_logged = self.ranks.mean(float(self._tr_loss))
        weights, moments = self.weights(), self._moments()
        # Places that all ranks pass, the writer's rank and those that only wait for it: else one of them would seem to be ahead.
        self.watchdog.at(f"step {step}, waiting for the checkpoint before it")
        if self.writer is not None:
            # It is written from the memory that this one is copied to.
            self.writer.join()
        self.watchdog.at(f"step {step}, copying the checkpoint off")
        if self.writer is None:
            return
        adapter = self._adapter(weights)
        copies = self._copy_off({**adapter, **moments})
        points = [p["loss"] for p in self.state.log_history if "loss" in p and p["step"] > self._saved_step]
        state = {
            "step": step,
            "next_row": step * len(self._recent[step]),
            "random_numbers": {"seed": self.args.seed, "made_from": "seed, step, place of the micro-batch"},
            "scheduler": self.lr_scheduler.state_dict(),
            "loss_since_logged": since_logged,
            "last_logged_step": self._globalstep_last_logged,
        }
        snapshot = Snapshot(
            step=step,
            adapter={name: copies[name] for name in adapter},
            optimizer={name: copies[name] for name in moments},
            texts={
                STATE: json.dumps(state, indent=2, sort_keys=True),
                TRAINER_STATE: json.dumps(dataclasses.asdict(self.state), indent=2, sort_keys=True),
                ADAPTER_CONFIG: adapter_config(self.model),
            },
            loss=sum(points) / len(points) if points else None,
        )
        self._saved_step = step
        self.writer.submit(snapshot)
        self._reports.checkpoint_s += time.perf_counter() - began

    def weights(self) -> dict[str, torch.Tensor]:
        """What is trained, whole, by its names in the model; all ranks ask, and rank 0 is answered."""
        return trained_weights(self.model)

    def _adapter(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        named: dict[str, torch.Tensor] = get_peft_model_state_dict(self.model, state_dict=weights)
        return named

    def _moments(self) -> dict[str, torch.Tensor]:
        state = self.optimizer.optimizer.state
        return {
            f"{key}/{name}": value
            for name, parameter in trained_weights(self.model).items()
            for key, value in state[parameter].items()
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint) / ADAPTER_WEIGHTS
        tensors = load_file(path)
        expected = self._adapter(trained_weights(self.model))
        if tensors.keys() != expected.keys():
            odd = sorted(tensors.keys() ^ expected.keys())
            raise ValueError(
                f"{path} is not of this adapter: {odd[0]} and {len(odd) - 1} more stand in one of the two only"
            )
        set_peft_model_state_dict(self.model, tensors)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = read_json(Path(checkpoint) / STATE)
        self._restored = state
        self._saved_step = state["step"]
        # One entry for each group of parameters, all alike; DeepSpeed leaves out the groups that are empty.
        num_groups = len(self.optimizer.param_groups)
        self.lr_scheduler.load_state_dict(
            {
                name: value[:1] * num_groups if isinstance(value, list) else value
                for name, value in state["scheduler"].items()
            }
        )
        self._load_moments(load_file(Path(checkpoint) / OPTIMIZER))
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _load_moments(self, tensors: Mapping[str, torch.Tensor]) -> None:
        optimizer = self.optimizer.optimizer
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        whole = optimizer.state_dict()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        whole["state"] = {number: state_of(tensors, names[id(p)]) for number, p in enumerate(parameters)}
        optimizer.load_state_dict(whole)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to load: every micro-batch makes its own."""

    def restore_curve(self) -> None:
        """Before the first step: take up the loss since the last logged point."""
        if self._restored is not None:
            self._tr_loss.fill_(self._restored["loss_since_logged"])
            self._globalstep_last_logged = self._restored["last_logged_step"]


class _StepEnd(TrainerCallback):
    """Tells the trainer where its loop is."""

    def __init__(self, trainer: Elastic) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.restore_curve()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.end_step(control)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.check_curve()


class _KeepRows:
    """A collator that lets the rows' numbers through, as plain integers: on a GPU they would have to be waited for."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self._collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [example.pop(ROW) for example in examples]
        return {**self._collate(examples), ROW: rows}


def seed_of(seed: int, step: int, place: int) -> int:
    """The seed of a micro-batch: of the run's seed, the step, and its place in the global batch."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{place}".encode()).digest()[:8], "big")


def adapter_config(model: PeftModel) -> str:
    """PEFT's configuration of the adapter as PEFT writes it, for use rather than for training."""
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return (Path(folder) / "adapter_config.json").read_text(encoding="utf-8")


def state_of(moments: Mapping[str, torch.Tensor], parameter: str) -> dict[str, torch.Tensor]:
    """AdamW's state of one parameter, out of those of all."""
    suffix = f"/{parameter}"
    return {name.removesuffix(suffix): tensor for name, tensor in moments.items() if name.endswith(suffix)}
