"""What each node is: versions, processors, filesystems, clocks, and its GPUs and links as NVIDIA's driver tells them."""

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from tasks.cluster.faults import Faults
from tasks.cluster.meeting import Meeting
from tasks.hardware.infiniband import ADAPTERS, ports
from tasks.hardware.kernel_log import xids
from tasks.hardware.nvml import describe_gpus
from tasks.hardware.topology import near

LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
OUR_MARK = "PROVING_GROUND_ATTEMPT"


def take_inventory(meeting: Meeting, faults: Faults) -> None:
    """Facts of this process and its node; looks at GPUs through the driver alone and uses none."""
    recorder = meeting.recorder
    meeting.begin("versions")
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "kernel": platform.release(),
        **{name: _version(name) for name in LIBRARIES},
        "cuda": torch.version.cuda or "none",
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none",
    }
    facts["torch"] = faults.version(facts["torch"])
    for name, value in facts.items():
        recorder.fact(name, value)
    meeting.begin("processors and memory")
    recorder.fact("num_processors", len(os.sched_getaffinity(0)))
    recorder.fact("num_threads", torch.get_num_threads())
    recorder.fact("governor", _governor())
    recorder.fact("processor", _processor())
    recorder.figure("memory_total_gbytes", psutil.virtual_memory().total / 1e9)
    recorder.figure("load_per_processor", os.getloadavg()[0] / (os.cpu_count() or 1))
    meeting.begin("GPUs and links")
    if meeting.process == 0:
        gpus, error = describe_gpus()
        recorder.fact("gpus", gpus)
        if error:
            recorder.fact("nvml_error", error)
        recorder.fact("topology", near())
        recorder.fact("infiniband", ports(ADAPTERS))
        recorder.fact("xids", xids())
    meeting.begin("clocks")
    _clock(meeting)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _governor() -> str:
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return path.read_text().strip() if path.exists() else "not told"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _clock(meeting: Meeting) -> None:
    """Seconds by which each clock is ahead of rank 0's, all read right after one meeting."""
    torch.distributed.barrier(meeting.control)
    times = meeting.gather(time.time())
    meeting.recorder.figure("clock_ahead_s", times[meeting.rank] - times[0])
