"""Each GPU of this machine as NVIDIA's driver describes it. Written from NVML's documentation; a part that a GPU or driver
does not tell is None.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

MAX_NVLINKS = 18


def describe_gpus() -> tuple[list[dict[str, Any]], str | None]:
    """The GPUs that this process may use, in the driver's order, and why there are none where the driver cannot be asked."""
    import pynvml

    from tasks.hardware.gpus import visible_gpus

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], str(error)
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        return [_describe(pynvml, uuid, driver) for uuid in visible_gpus()], None
    except pynvml.NVMLError as error:
        return [], str(error)
    finally:
        pynvml.nvmlShutdown()


def _describe(nvml: Any, uuid: str, driver: str) -> dict[str, Any]:
    # visible_gpus shuts the library down again.
    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByUUID(uuid)

    def ask(question: Callable[[], Any]) -> Any:
        try:
            return question()
        except nvml.NVMLError:
            return None

    corrected, uncorrected, pending, failed = ask(lambda: nvml.nvmlDeviceGetRemappedRows(handle)) or (None,) * 4
    links = [ask(partial(nvml.nvmlDeviceGetNvLinkState, handle, link)) for link in range(MAX_NVLINKS)]
    present = [state for state in links if state is not None]
    processes = ask(lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    milliwatts = ask(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
    return {
        "uuid": uuid,
        "name": ask(lambda: nvml.nvmlDeviceGetName(handle)),
        "driver": driver,
        "memory_gbytes": ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total / 1e9),
        "power_limit_watts": None if milliwatts is None else milliwatts / 1000,
        "max_sm_clock_mhz": ask(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)),
        "persistence": ask(lambda: bool(nvml.nvmlDeviceGetPersistenceMode(handle))),
        "ecc": ask(lambda: bool(nvml.nvmlDeviceGetEccMode(handle)[0])),
        "ecc_uncorrected": ask(
            lambda: nvml.nvmlDeviceGetTotalEccErrors(
                handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            )
        ),
        "remapped_uncorrected": uncorrected,
        "remapped_corrected": corrected,
        "remap_pending": None if pending is None else bool(pending),
        "remap_failed": None if failed is None else bool(failed),
        "pcie_generation": ask(lambda: nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle)),
        "max_pcie_generation": ask(lambda: nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)),
        "pcie_width": ask(lambda: nvml.nvmlDeviceGetCurrPcieLinkWidth(handle)),
        "max_pcie_width": ask(lambda: nvml.nvmlDeviceGetMaxPcieLinkWidth(handle)),
        "nvlinks_up": sum(bool(state) for state in present) if present else None,
        "nvlinks": len(present),
        "busy_processes": None if processes is None else sorted(p.pid for p in processes if p.pid != os.getpid()),
    }
