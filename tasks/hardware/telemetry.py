"""Clocks, power, temperature and throttle reasons of a GPU, read from NVIDIA's driver while it works."""

import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

THROTTLE_REASONS = {
    0x0000000000000004: "software power cap",
    0x0000000000000008: "hardware slowdown",
    0x0000000000000010: "sync boost",
    0x0000000000000020: "software thermal slowdown",
    0x0000000000000040: "hardware thermal slowdown",
    0x0000000000000080: "hardware power brake",
    0x0000000000000100: "display clock setting",
}
"""Bits of nvmlDeviceGetCurrentClocksEventReasons that lower clocks; idle (1) and set application clocks (2) are no fault.
Source: nvml.h, nvmlClocksEventReason*."""
HARMFUL = frozenset(
    {"hardware slowdown", "software thermal slowdown", "hardware thermal slowdown", "hardware power brake"}
)
"""Reasons that call for a person. A power cap is how a chip under full load runs."""
Sample = Mapping[str, float]
READ_S = 0.2


def reasons_of(bits: int) -> tuple[str, ...]:
    """The names of set bits; one that is not known is told by its number."""
    known = tuple(name for bit, name in THROTTLE_REASONS.items() if bits & bit)
    rest = bits & ~sum(THROTTLE_REASONS) & ~0x3
    return (*known, *([f"unknown reason {rest:#x}"] if rest else []))


def summary(samples: Sequence[Sample]) -> tuple[dict[str, float], tuple[str, ...]]:
    """Figures with units and the harmful throttle reasons seen, from samples under load; no samples, no figures."""
    if not samples:
        return {}, ()
    bits = 0
    for sample in samples:
        bits |= int(sample["throttle_bits"])
    clocks = sorted(sample["sm_clock_mhz"] for sample in samples)
    figures = {
        "sm_clock_mhz": clocks[len(clocks) // 2],
        "power_watts": max(sample["power_watts"] for sample in samples),
        "temperature_celsius": max(sample["temperature_celsius"] for sample in samples),
        "throttled_share": sum(bool(HARMFUL & set(reasons_of(int(s["throttle_bits"])))) for s in samples)
        / len(samples),
    }
    return figures, reasons_of(bits)


class Sampler:
    """Samples one GPU in a thread while the block runs.

    Args:
        read: one sample; None: there is no GPU, and nothing is sampled.

    Attributes:
        error: why sampling ended before the block did; None while it goes on.
    """

    def __init__(self, read: Callable[[], Sample] | None, every_s: float = READ_S) -> None:
        self._read, self._every_s = read, every_s
        self._samples: list[Sample] = []
        self.error: str | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def of(cls, process: int | None, every_s: float = READ_S) -> "Sampler":
        """Of this node's GPU number ``process`` among those that are ours; None: of nothing."""
        return cls(None if process is None else _reader(process), every_s)

    def __enter__(self) -> "Sampler":
        if self._read is not None:
            self._thread = threading.Thread(target=self._sample, name="telemetry", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def take(self) -> list[Sample]:
        """The samples since this was last asked."""
        taken, self._samples = self._samples, []
        return taken

    def figures(self) -> dict[str, float]:
        """See :func:`summary`."""
        return summary(self._samples)[0]

    @property
    def throttle_reasons(self) -> tuple[str, ...]:
        """Every reason that was seen."""
        return summary(self._samples)[1]

    def _sample(self) -> None:
        assert self._read is not None
        while not self._done.wait(self._every_s):
            try:
                self._samples.append(self._read())
            except Exception as error:
                # The driver's, of whatever kind. Whoever uses the figures finds none from here on, and why.
                self.error = f"{type(error).__name__}: {error}"
                return


def _reader(process: int) -> Callable[[], Sample]:
    import pynvml

    from tasks.hardware.gpus import visible_gpus

    uuid = visible_gpus()[process]
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)

    def read() -> Sample:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return {
            "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "power_watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "temperature_celsius": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "use_percent": pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            "memory_share": memory.used / memory.total,
            "throttle_bits": pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
        }

    return read
