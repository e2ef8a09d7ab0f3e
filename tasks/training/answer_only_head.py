"""On a CPU, let TRL's language-model head score the answers only.

TRL 1.16 leaves out the positions that carry no label before the head only where Triton runs, because on other
accelerators the changing number of positions would recompile its kernels at every batch
(``trl/trainer/utils.py``, ``_fused_forward``). A CPU compiles nothing, and with a vocabulary of 49,152 and prompts three
times as long as the answers the head on every position was 44 % of a training step. The loss is the same; a test holds
the two equal.
"""

import torch
import trl.trainer.utils

_where_triton_runs = trl.trainer.utils._use_triton


def _compiles_nothing_or_triton(device: torch.device) -> bool:
    return device.type == "cpu" or bool(_where_triton_runs(device))


def score_answers_only() -> None:
    """Make the trainers built from now on leave out positions without a label on the CPU, too."""
    trl.trainer.utils._use_triton = _compiles_nothing_or_triton
