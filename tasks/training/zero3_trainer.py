"""DeepSpeed ZeRO-3: base, adapter, gradients and AdamW's moments in parts over all ranks, and still whole checkpoints.

DeepSpeed's own checkpoints are pickles for one number of ranks; none is written or read. Trained tensors and their moments
are gathered in float32, one after the other, to be saved, and of loaded ones every rank takes its part. The files are those
of data parallelism, and a run goes on from one strategy with the other, on any number of ranks.

Source of the calls: https://deepspeed.readthedocs.io/en/latest/zero3.html (``deepspeed.utils.safe_*``).
"""

import importlib.util
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from tasks.training.adapter import trained_weights
from tasks.training.checkpoints import ADAPTER_WEIGHTS
from tasks.training.elastic import Elastic, state_of

DEEPSPEED_CONFIG: Mapping[str, Any] = {
    # `auto` is filled in by transformers, from its own arguments or the size of the model's layers.
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    # Gradients are summed in float32, over micro-batches and over ranks, whatever they were computed in.
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
}


class Zero3Trainer(Elastic):
    """:class:`Elastic` on a model that DeepSpeed holds in parts."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, None)
        # DeepSpeed takes the adapter over, which is whole until then, and rounds it where it multiplies in bfloat16.
        self._load_from_checkpoint(resume_from_checkpoint)
        # transformers would look for a checkpoint of DeepSpeed's.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_masters(Path(resume_from_checkpoint) / ADAPTER_WEIGHTS)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def weights(self) -> dict[str, torch.Tensor]:
        """As AdamW holds them, in float32; all ranks must ask, and rank 0 alone is answered."""
        from deepspeed.utils import safe_get_full_fp32_param

        found = {}
        for name, parameter in trained_weights(self.model).items():
            whole = safe_get_full_fp32_param(parameter)
            if self.ranks.rank == 0:
                found[name] = whole.cpu()
        return found

    def _moments(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        found = {}
        for name, parameter in trained_weights(self.model).items():
            for key, value in self._adamw.state[self._flat_parts[0]].items():
                # One count of steps serves all parameters.
                whole = safe_get_full_optimizer_state(parameter, key) if value.dim() else value
                if self.ranks.rank == 0:
                    found[f"{key}/{name}"] = whole.cpu()
        return found

    def _load_masters(self, path: Path) -> None:
        from deepspeed.utils import safe_set_local_fp32_param

        tensors = load_file(path)
        for name, parameter in get_peft_model_state_dict(self.model, state_dict=trained_weights(self.model)).items():
            safe_set_local_fp32_param(parameter, self._own_part(tensors[name], parameter))

    def _load_moments(self, tensors: Mapping[str, torch.Tensor]) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        named = trained_weights(self.model)
        states = {name: state_of(tensors, name) for name in named}
        for flat in self._flat_parts:
            # AdamW makes its state with its first step, which a resumed run has behind it.
            self._adamw.state[flat] = {
                key: torch.zeros_like(flat) if value.dim() else value.clone()
                for key, value in next(iter(states.values())).items()
            }
        for name, parameter in named.items():
            for key, value in states[name].items():
                if value.dim():
                    safe_set_local_optimizer_state(parameter, self._own_part(value, parameter), key)

    @property
    def _flat_parts(self) -> list[torch.Tensor]:
        """What AdamW steps on: this rank's parts of many parameters, end to end."""
        parts: list[torch.Tensor] = self.optimizer.optimizer.fp32_partitioned_groups_flat
        return parts

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        adamw: torch.optim.Optimizer = self.optimizer.optimizer.optimizer
        return adamw

    def _own_part(self, whole: torch.Tensor, parameter: Any) -> torch.Tensor:
        return part_of(whole, parameter.ds_tensor.numel(), self.ranks.rank)


def part_of(whole: torch.Tensor, num_elements: int, rank: int) -> torch.Tensor:
    """A rank's part of a tensor, flat; the last one is filled up with zeros.

    DeepSpeed's ``safe_set_full_*`` fail where the ranks do not divide the tensor.
    """
    own = whole.flatten()[rank * num_elements : (rank + 1) * num_elements]
    return nn.functional.pad(own, (0, num_elements - own.numel()))


def join_deepspeed() -> dict[str, Any]:
    """Tell accelerate that DeepSpeed trains, on a CPU as well, which it would not; ``SFTConfig``'s arguments for it."""
    import deepspeed

    if dist.get_backend() == "gloo":
        # It would be compiled for minutes, for an all-reduce that only inference uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed uses older names of torch's collectives, and would say so at every one of them.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend=dist.get_backend())
    return {"deepspeed": dict(DEEPSPEED_CONFIG)}


def is_installed() -> bool:
    """Whether DeepSpeed is."""
    return importlib.util.find_spec("deepspeed") is not None
