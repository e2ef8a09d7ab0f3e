"""All devices under load for minutes: what drifts, and what breaks only when it is warm."""

import statistics
import time

import torch

from tasks.cluster.devices import factors, sampler_figures
from tasks.cluster.faults import Faults
from tasks.cluster.meeting import Meeting
from tasks.contracts.cluster_settings import DeviceProbeSettings
from tasks.hardware.kernel_log import xids
from tasks.hardware.nvml import describe_gpus
from tasks.hardware.telemetry import Sampler

SLICE_S = 15.0
PRODUCTS_WHILE_READING = 200
"""Of 8192 x 8192 in bfloat16 about 0.3 s: an idle GPU lowers its PCIe link to save power."""


def measure_endurance(meeting: Meeting, settings: DeviceProbeSettings, seconds: float, faults: Faults) -> None:
    """Products in slices; the same product must stay the same, and as fast as in the beginning."""
    left, right = factors(meeting, settings.matrix_size)
    if meeting.is_gpu:
        left, right = left.bfloat16(), right.bfloat16()
    first = left @ right
    rates: list[float] = []
    ends = time.monotonic() + seconds
    with Sampler.of(meeting.process if meeting.is_gpu else None) as sampler:
        while True:
            # All go on or all stop: by rank 0's clock.
            if not meeting.gather(time.monotonic() < ends)[0]:
                break
            meeting.begin(f"endurance, slice {len(rates) + 1}")
            began, count = time.monotonic(), 0
            while time.monotonic() - began < min(SLICE_S, seconds / 4):
                faults.before_work()
                again = left @ right
                meeting.sync()
                count += 1
            if not torch.equal(again, first):
                meeting.recorder.problem(
                    "endurance_correct", f"slice {len(rates) + 1}: the same product has other bits"
                )
            rates.append(2 * settings.matrix_size**3 * count / (time.monotonic() - began) / 1e12)
    if meeting.is_gpu:
        meeting.begin("errors under load")
        for _ in range(PRODUCTS_WHILE_READING):
            again = left @ right
        if meeting.process == 0:
            meeting.recorder.fact("gpus", describe_gpus()[0])
            meeting.recorder.fact("xids", xids())
        meeting.sync()
    quarter = max(1, len(rates) // 4)
    start, end = statistics.median(rates[:quarter]), statistics.median(rates[-quarter:])
    meeting.recorder.figure("endurance_product_tflops_per_s", end)
    meeting.recorder.figure("endurance_slowdown_share", max(0.0, 1 - end / start))
    sampler_figures(meeting, sampler, "endurance_")
