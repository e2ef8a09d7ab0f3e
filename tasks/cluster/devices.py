"""What one GPU, or one CPU process, can do by itself: products, copies, memory that keeps what is written, the same twice."""

import hashlib
import math
import statistics
import time
from collections.abc import Callable

import torch

from tasks.cluster.faults import Faults
from tasks.cluster.meeting import Meeting
from tasks.contracts.cluster_settings import DeviceProbeSettings
from tasks.hardware.telemetry import Sampler

PATTERN_PART_BYTES = 256 << 20
PATTERNS = (0x00, 0xFF, 0x55, 0xAA, 0x01, 0x80)
"""All bits off and on, neighbours against each other, single bits."""
STEP_SIZE, STEP_TOKENS, STEP_LAYERS = 512, 256, 4
NUM_STEPS = 5


def measure_devices(meeting: Meeting, settings: DeviceProbeSettings, faults: Faults) -> None:
    """Everything of this device; all ranks at once, as in training."""
    meeting.begin("products under load")
    with Sampler.of(meeting.process if meeting.is_gpu else None) as sampler:
        _warm_up(meeting, settings)
        for precision in _precisions(meeting):
            meeting.begin(f"{precision} products")
            _product(meeting, settings, faults, precision)
    sampler_figures(meeting, sampler)
    meeting.begin("memory copies")
    _copy(meeting, settings, faults)
    if meeting.is_gpu:
        meeting.begin("copies between host and device")
        _host_copies(meeting, settings, faults)
    meeting.begin("memory pattern")
    _pattern(meeting, settings)
    meeting.begin("the same training step twice")
    _silent_corruption(meeting, faults)


def sampler_figures(meeting: Meeting, sampler: Sampler, prefix: str = "") -> None:
    """What was sampled under load, as figures and a fact; a GPU of which nothing was sampled fails by missing figures."""
    if sampler.error is not None:
        # Of the part of the load that was not sampled nothing is known, throttling least of all.
        meeting.recorder.fact(f"{prefix}telemetry_error", sampler.error)
        return
    for name, value in sampler.figures().items():
        meeting.recorder.figure(prefix + name, value)
    if sampler.throttle_reasons:
        meeting.recorder.fact(f"{prefix}throttle_reasons", list(sampler.throttle_reasons))


def _precisions(meeting: Meeting) -> list[str]:
    if not meeting.is_gpu:
        return ["float32"]
    has_fp8 = torch.cuda.get_device_capability(meeting.device) >= (8, 9)
    return ["bfloat16", "float32", *(["float8"] if has_fp8 else [])]


def factors(meeting: Meeting, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two square matrices to multiply, seeded by the rank."""
    # Random, never zeros or ones: chips draw less power for those and run faster than they can in training.
    draw = torch.Generator(meeting.device).manual_seed(meeting.rank + 1)
    return tuple(torch.randn(size, size, generator=draw, device=meeting.device) for _ in range(2))


def _warm_up(meeting: Meeting, settings: DeviceProbeSettings) -> None:
    left, right = factors(meeting, settings.matrix_size)
    if meeting.is_gpu:
        left, right = left.bfloat16(), right.bfloat16()
    ends = time.monotonic() + settings.warmup_s
    while time.monotonic() < ends:
        left @ right
        meeting.sync()


def _product(meeting: Meeting, settings: DeviceProbeSettings, faults: Faults, precision: str) -> None:
    """TFLOP/s of a square product, 2 n^3 operations each."""
    size = settings.matrix_size
    left, right = factors(meeting, size)
    work: Callable[[], object]
    if precision == "float8":
        one = torch.ones((), device=meeting.device)
        a, b = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t().contiguous().t()
        work = lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)  # noqa: E731
    else:
        dtype = getattr(torch, precision)
        left, right = left.to(dtype), right.to(dtype)
        output = torch.empty_like(left)
        work = lambda: torch.mm(left, right, out=output)  # noqa: E731

    def slowed() -> None:
        faults.before_work()
        work()

    work()
    seconds = faults.seconds(meeting.timed(slowed, settings.num_repeats))
    rates = [2 * size**3 / value / 1e12 for value in seconds]
    meeting.recorder.figure(f"matrix_product_{precision}_tflops_per_s", _rate(meeting, rates))


def _rate(meeting: Meeting, rates: list[float]) -> float:
    """The median on a GPU; on a processor, which others use as well, the best: the median would be theirs."""
    return math.nan if any(map(math.isnan, rates)) else statistics.median(rates) if meeting.is_gpu else max(rates)


def _copy(meeting: Meeting, settings: DeviceProbeSettings, faults: Faults) -> None:
    """GB/s of a copy inside the device's memory, read and write counted."""
    source = torch.ones(settings.copy_mbytes * 250_000, dtype=torch.float32, device=meeting.device)
    target = torch.zeros_like(source)
    target.copy_(source)
    seconds = faults.seconds(meeting.timed(lambda: target.copy_(source), settings.num_repeats))
    size = 2 * source.numel() * 4
    meeting.recorder.figure("memory_copy_gbytes_per_s", _rate(meeting, [size / value / 1e9 for value in seconds]))


def _host_copies(meeting: Meeting, settings: DeviceProbeSettings, faults: Faults) -> None:
    """GB/s between pinned host memory and the device, each way."""
    host = torch.ones(settings.copy_mbytes * 250_000, dtype=torch.float32, pin_memory=True)
    device = torch.zeros(host.shape, dtype=host.dtype, device=meeting.device)
    for name, target, source in (("host_to_device", device, host), ("device_to_host", host, device)):

        def move(target: torch.Tensor = target, source: torch.Tensor = source) -> None:
            target.copy_(source, non_blocking=True)

        move()
        seconds = faults.seconds(meeting.timed(move, settings.num_repeats))
        rates = [host.numel() * 4 / value / 1e9 for value in seconds]
        meeting.recorder.figure(f"{name}_gbytes_per_s", statistics.median(rates))


def _pattern(meeting: Meeting, settings: DeviceProbeSettings) -> None:
    """Write patterns over a share of the free memory and read them back."""
    size = int(_free_bytes(meeting) * settings.memory_share)
    if settings.max_pattern_mbytes is not None:
        size = min(size, settings.max_pattern_mbytes * 10**6)
    memory = torch.empty(size, dtype=torch.uint8, device=meeting.device)
    wrong = 0
    for pattern in PATTERNS:
        memory.fill_(pattern)
        meeting.sync()
        # In parts: the comparison takes as much memory again as what it looks at.
        wrong += sum(int((part != pattern).sum()) for part in memory.split(PATTERN_PART_BYTES))
    meeting.recorder.figure("memory_pattern_wrong_bytes", wrong)
    meeting.recorder.figure("memory_pattern_tested_gbytes", size / 1e9)
    if wrong:
        meeting.recorder.problem(
            "memory_pattern_correct", f"{wrong} bytes of {size} did not keep what was written to them"
        )


def _free_bytes(meeting: Meeting) -> int:
    if meeting.is_gpu:
        free, _ = torch.cuda.mem_get_info(meeting.device)
        return int(free)
    import psutil

    return int(psutil.virtual_memory().available)


def _silent_corruption(meeting: Meeting, faults: Faults) -> None:
    """One seeded training step over and over: its bits must be the same each time, and on every like device."""
    digests, seconds = [], []
    for _ in range(NUM_STEPS):
        began = time.perf_counter()
        faults.before_work()
        digests.append(_step(meeting))
        seconds.append(time.perf_counter() - began)
    meeting.recorder.fact("step_sha256", digests[0])
    if len(set(digests)) > 1:
        meeting.recorder.problem(
            "step_repeats_bitwise", f"the same seeded step gave {len(set(digests))} different results in {NUM_STEPS}"
        )
    if meeting.is_gpu:
        # Most of such a step's time is the host's, which draws and hashes: it says nothing about the GPU.
        return
    # The first compiles and allocates.
    meeting.recorder.figure("step_s", 1 / _rate(meeting, [1 / value for value in faults.seconds(seconds[1:])]))


def _step(meeting: Meeting) -> str:
    """Forward, backward and an update of a small feed-forward network; SHA-256 of its weights after it."""
    draw = torch.Generator().manual_seed(7)
    weights = [torch.randn(STEP_SIZE, STEP_SIZE, generator=draw) / STEP_SIZE**0.5 for _ in range(STEP_LAYERS)]
    tensors = [w.to(meeting.device).requires_grad_() for w in weights]
    hidden = torch.randn(STEP_TOKENS, STEP_SIZE, generator=draw).to(meeting.device)
    for weight in tensors:
        hidden = torch.nn.functional.gelu(hidden @ weight) + hidden
    hidden.square().mean().backward()
    digest = hashlib.sha256()
    with torch.no_grad():
        for weight in tensors:
            assert weight.grad is not None
            updated = (weight - 0.1 * weight.grad).cpu().contiguous()
            digest.update(updated.numpy().tobytes())
    return digest.hexdigest()
