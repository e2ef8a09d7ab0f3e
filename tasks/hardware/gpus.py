"""The GPUs of this machine, asked of NVIDIA's driver: no torch, which a flow's process must not import."""

import os
from collections.abc import Mapping


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The UUIDs of the GPUs that this process may use, in the driver's order; none without a driver.

    ``CUDA_VISIBLE_DEVICES`` narrows them, as it does for CUDA: numbers or beginnings of UUIDs, up to the first that names
    no GPU.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        present = [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    finally:
        pynvml.nvmlShutdown()
    return narrowed(present, environment.get("CUDA_VISIBLE_DEVICES"))


def narrowed(present: list[str], wanted: str | None) -> list[str]:
    """Those of the GPUs ``present`` that a value of ``CUDA_VISIBLE_DEVICES`` names; all where it is not set."""
    if wanted is None:
        return present
    chosen: list[str] = []
    for name in (part.strip() for part in wanted.split(",")):
        if name.isdigit():
            found = present[int(name) : int(name) + 1]
        else:
            found = [uuid for uuid in present if name and uuid.startswith(name)]
        # CUDA takes nothing behind a name that it does not know.
        if len(found) != 1 or found[0] in chosen:
            break
        chosen += found
    return chosen
