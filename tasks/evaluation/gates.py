"""The success criteria of a run: each with what was measured and what was asked for. What was not measured does not pass."""

import operator
from collections.abc import Callable, Mapping
from typing import Literal

from tasks.contracts.comparison import Gate, GroupFigures
from tasks.contracts.measurements import Measurements
from tasks.contracts.settings import GateSettings

Relation = Literal[">=", "<", "<="]
HOLDS: Mapping[Relation, Callable[[float, float], bool]] = {">=": operator.ge, "<": operator.lt, "<=": operator.le}


def check_gates(
    gates: GateSettings, primary: GroupFigures, no_tool: GroupFigures, measured: Measurements
) -> tuple[Gate, ...]:
    """Every criterion that applies to the run, those about the answers first.

    Args:
        primary: the requests that need a call.
        no_tool: those that no tool fits.
    """
    found: list[Gate] = []

    def gate(
        name: str, description: str, value: float | None, relation: Relation, threshold: float | None, unit: str = ""
    ) -> None:
        if threshold is not None:
            passed = value is not None and HOLDS[relation](value, threshold)
            found.append(Gate(name, description, value, threshold, passed, relation, unit))

    tuned, paired = primary.finetuned, primary.paired
    gate("min_exact_match", "Exact match, fine-tuned, requests needing a call", tuned.exact_match.value, ">=",
         gates.min_exact_match, "%")  # fmt: skip
    gate("min_requests", "Scored requests needing a call", tuned.exact_match.n, ">=", gates.min_requests)
    # A significant loss is no success: the p-value counts only for a change upwards.
    is_up = (paired.difference or 0) > 0
    gate("max_p_value", "p-value of the improvement (exact test)", paired.p_value if is_up else 1.0, "<",
         gates.max_p_value)  # fmt: skip
    gate("min_call_rate", "Call rate, fine-tuned, requests needing a call", tuned.call_rate.value, ">=",
         gates.min_call_rate, "%")  # fmt: skip
    gate("min_abstention", "Abstention, fine-tuned, requests with no fitting tool",
         no_tool.finetuned.exact_match.value, ">=", gates.min_abstention, "%")  # fmt: skip
    gate("max_plain_loss_increase", "Forgetting: growth of the loss on plain conversations",
         measured.plain_loss_increase, "<", gates.max_plain_loss_increase, "%")  # fmt: skip
    gate("max_final_loss", "Training loss at the end", measured.final_loss, "<", gates.max_final_loss)
    gate("min_tokens_per_s_per_gpu", "Training throughput", measured.tokens_per_s_per_gpu, ">=",
         gates.min_tokens_per_s_per_gpu, "tokens/s/GPU")  # fmt: skip
    gate("min_gpu_utilization", "GPU use in training", measured.gpu_utilization, ">=", gates.min_gpu_utilization, "%")
    gate("min_gpu_memory_share", "GPU memory held in training", measured.gpu_memory_share, ">=",
         gates.min_gpu_memory_share, "%")  # fmt: skip
    gate("min_inference_tokens_per_s", "Inference, fine-tuned", measured.finetuned.new_tokens_per_s, ">=",
         gates.min_inference_tokens_per_s, "new tokens/s")  # fmt: skip
    succeeded = sum(stage.succeeded for stage in measured.stages)
    gate("stages_succeeded", "Stages that ended with exit code 0", succeeded, ">=", len(measured.stages) or None)
    gate("final_checkpoint", "Final checkpoint is there, whole", float(measured.has_final_checkpoint), ">=", 1)
    gate("max_out_of_memory", "Times that memory ran out", measured.num_out_of_memory, "<=", gates.max_out_of_memory)
    gate("max_hours", "From first job to last", measured.wall_hours, "<", gates.max_hours, "h")
    gate("max_gpu_hours", "GPU-hours", measured.gpu_hours, "<=", gates.max_gpu_hours, "h")
    return tuple(found)
