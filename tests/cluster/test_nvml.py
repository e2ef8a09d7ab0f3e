"""The driver's description of GPUs, from a stand-in for NVML: what it does not tell is None, and its absence is told."""

import sys
from types import SimpleNamespace

import pytest

from tasks.hardware.nvml import describe_gpus


class NVMLError(Exception):
    pass


class Driver:
    """Two GPUs; names in ``refuses`` are questions that this driver does not know."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 1, 0
    UUIDS = ("GPU-aa", "GPU-bb")

    def __init__(self, refuses: tuple[str, ...] = ()) -> None:
        self.refuses = refuses

    def __getattr__(self, name: str):
        answers = {
            "nvmlInit": None,
            "nvmlShutdown": None,
            "nvmlDeviceGetCount": len(self.UUIDS),
            "nvmlSystemGetDriverVersion": "570.86.15",
            "nvmlDeviceGetName": "NVIDIA H100 80GB HBM3",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=85_520_809_984),
            "nvmlDeviceGetRemappedRows": (1, 2, 1, 0),
            "nvmlDeviceGetEnforcedPowerLimit": 700_000,
            "nvmlDeviceGetMaxClockInfo": 1980,
            "nvmlDeviceGetPersistenceMode": 1,
            "nvmlDeviceGetEccMode": [1, 1],
            "nvmlDeviceGetTotalEccErrors": 0,
            "nvmlDeviceGetCurrPcieLinkGeneration": 5,
            "nvmlDeviceGetMaxPcieLinkGeneration": 5,
            "nvmlDeviceGetCurrPcieLinkWidth": 8,
            "nvmlDeviceGetMaxPcieLinkWidth": 16,
            "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=4711)],
        }
        if name in self.refuses:
            return self._refuse
        if name == "nvmlDeviceGetUUID":
            return lambda handle: handle
        if name == "nvmlDeviceGetHandleByIndex":
            return lambda index: self.UUIDS[index]
        if name == "nvmlDeviceGetHandleByUUID":
            return lambda uuid: uuid
        if name == "nvmlDeviceGetNvLinkState":
            return self._link
        if name in answers:
            return lambda *of: answers[name]
        raise AttributeError(name)

    def _refuse(self, *of: object) -> None:
        raise NVMLError("Not Supported")

    def _link(self, handle: str, link: int) -> int:
        if link >= 4:
            raise NVMLError("Invalid Argument")
        return int(not (handle == "GPU-bb" and link == 2))


@pytest.fixture
def driver(monkeypatch):
    def use(*refuses: str) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", Driver(refuses))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return use


def test_every_gpu_is_described_with_units(driver):
    driver()
    (first, second), error = describe_gpus()
    assert error is None
    assert (first["uuid"], first["name"], first["driver"]) == ("GPU-aa", "NVIDIA H100 80GB HBM3", "570.86.15")
    assert first["memory_gbytes"] == pytest.approx(85.52, abs=0.01)
    assert first["power_limit_watts"] == 700
    # NVML: corrected, uncorrected, pending, failed.
    remapped = ("remapped_corrected", "remapped_uncorrected", "remap_pending", "remap_failed")
    assert [first[name] for name in remapped] == [1, 2, True, False]
    assert (first["pcie_width"], first["max_pcie_width"]) == (8, 16)
    assert (first["nvlinks_up"], first["nvlinks"], second["nvlinks_up"]) == (4, 4, 3)
    assert first["busy_processes"] == [4711]


def test_what_a_driver_does_not_tell_is_none_and_the_rest_is_still_told(driver):
    driver("nvmlDeviceGetRemappedRows", "nvmlDeviceGetTotalEccErrors", "nvmlDeviceGetComputeRunningProcesses")
    gpu = describe_gpus()[0][0]
    assert gpu["remap_failed"] is gpu["ecc_uncorrected"] is gpu["busy_processes"] is None
    assert gpu["name"] == "NVIDIA H100 80GB HBM3"


def test_a_driver_that_cannot_be_asked_gives_no_gpus_and_says_why(driver):
    driver("nvmlInit")
    assert describe_gpus() == ([], "Not Supported")
