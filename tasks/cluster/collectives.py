"""Collectives: right results first, then time of the slowest rank, and bandwidth by nccl-tests' formulas.

algbw = bytes / time; busbw = algbw x 2(n-1)/n for all-reduce, (n-1)/n for all-gather, reduce-scatter and all-to-all, 1 for
broadcast and send/recv, where bytes are those of the largest buffer of a rank.
Source: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tasks.cluster.faults import Faults
from tasks.cluster.meeting import Meeting
from tasks.cluster.recorder import percentile
from tasks.contracts.cluster_settings import CollectiveProbeSettings

# Names that torch 2.13 gave them; the ones of 2.11 are deprecated there.
_gather_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_tensor = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

WARMUP = 2
PERIOD = 1021
"""Prime: no block size is a multiple of it."""
SPAN_BYTES = 1 << 30
MAX_CALLS = 32
"""On a GPU a repetition is so many calls, one right behind the other, that about SPAN_BYTES travel, and not more than MAX_CALLS:
a single small message takes less time than its launch (14 instead of 66 GB/s at 1 MiB). nccl-tests times in the same way, with
launches from C."""
PAIR_REPEATS = 5
SLOW_PAIR = 0.8
"""Share of the median below which a pair is measured again alone: others' traffic is no fault of its link."""


def bus_factor(operation: str, num_ranks: int) -> float:
    """Busbw / algbw for ``num_ranks`` ranks."""
    if operation == "all_reduce":
        return 2 * (num_ranks - 1) / num_ranks
    if operation in ("all_gather", "reduce_scatter", "all_to_all"):
        return (num_ranks - 1) / num_ranks
    return 1.0


@dataclass(frozen=True)
class _Operation:
    """Buffers and the call; ``expected`` is what ``output`` must hold after it, bit for bit."""

    run: Callable[[], object]
    reset: Callable[[], object]
    output: torch.Tensor
    expected: torch.Tensor


def measure_collectives(meeting: Meeting, settings: CollectiveProbeSettings, faults: Faults) -> None:
    """All operations at all sizes, over all ranks and, where nodes have several processes, inside each node."""
    everyone = list(range(meeting.world_size))
    nodes = meeting.gather(meeting.node)
    scopes: list[tuple[str, list[int], Any]] = [("", everyone, dist.group.WORLD)]
    inside = [[r for r in everyone if nodes[r] == node] for node in sorted(set(nodes))]
    if len(inside) > 1 and all(len(ranks) > 1 for ranks in inside):
        # All ranks make all groups, in one order; nodes then measure at the same time.
        groups = [dist.new_group(ranks) for ranks in inside]
        mine = next(i for i, ranks in enumerate(inside) if meeting.rank in ranks)
        scopes.append(("node_", inside[mine], groups[mine]))
    for prefix, ranks, group in scopes:
        for operation in settings.operations:
            for size in settings.sizes_bytes():
                _measure(meeting, settings, faults, prefix, operation, size, ranks, group)
    if meeting.world_size > 1:
        _measure_pairs(meeting, settings, faults, nodes)


def measure_variant(
    meeting: Meeting, settings: CollectiveProbeSettings, faults: Faults, prefix: str, operations: Sequence[str],
    sizes_bytes: Sequence[int],
) -> None:  # fmt: skip
    """Some operations over all ranks, in whatever way the environment makes NCCL go."""
    everyone = list(range(meeting.world_size))
    for operation in operations:
        for size in sizes_bytes:
            _measure(meeting, settings, faults, prefix, operation, size, everyone, dist.group.WORLD)


def _measure(
    meeting: Meeting, settings: CollectiveProbeSettings, faults: Faults, prefix: str, operation: str, size_bytes: int,
    ranks: Sequence[int], group: Any,
) -> None:  # fmt: skip
    name = f"{prefix}{operation}"
    meeting.begin(f"{name} of {size_bytes} bytes")
    faults.before_collective(operation)
    operand = _operand(meeting, operation, size_bytes, ranks, group)
    operand.reset()
    operand.run()
    meeting.sync()
    faults.result(operand.output)
    wrong = int((operand.output != operand.expected).sum())
    if wrong:
        meeting.recorder.problem(
            f"{name}_correct",
            f"{wrong} of {operand.output.numel()} elements of {name} at {size_bytes} bytes are wrong on this rank",
        )
    for _ in range(WARMUP):
        operand.run()
    meeting.sync()
    dist.barrier(meeting.control)
    calls = _calls(meeting, size_bytes)
    seconds = faults.seconds(meeting.timed(operand.run, settings.num_repeats, faults.before_work, calls=calls))
    everyone = [times for rank, times in enumerate(meeting.gather(seconds)) if rank in ranks]
    longest = [_slowest(at_once) for at_once in zip(*everyone, strict=True)]
    # A collective ends for all at about the same time: who spends least in it came last.
    lateness = [last - mine for last, mine in zip(longest, seconds, strict=True)]
    slowest = [span / calls for span in longest]
    # Of all-reduce alone: others end at different times by their own shape (a broadcast's root is free first).
    if operation == "all_reduce" and not prefix:
        meeting.recorder.distribution("lateness_s", lateness, size_bytes=size_bytes)
    if meeting.rank == ranks[0]:
        size = operand.output.numel() * operand.output.element_size()
        if operation == "reduce_scatter":
            size *= len(ranks)
        algbw = size / statistics.median(slowest) / 1e9
        meeting.recorder.distribution(f"{name}_s", slowest, size_bytes=size_bytes)
        meeting.recorder.figure(f"{name}_algbw_gbytes_per_s", algbw, size_bytes=size_bytes)
        if len(ranks) > 1:
            # One rank alone sends nothing over any bus.
            meeting.recorder.figure(
                f"{name}_busbw_gbytes_per_s", algbw * bus_factor(operation, len(ranks)), size_bytes=size_bytes
            )


def _calls(meeting: Meeting, size_bytes: int) -> int:
    return max(1, min(MAX_CALLS, SPAN_BYTES // size_bytes)) if meeting.is_gpu else 1


def _slowest(seconds: Sequence[float]) -> float:
    """The longest time; no number if one is none, which max() would hide or not by the order."""
    return float("nan") if any(value != value for value in seconds) else max(seconds)


def _operand(meeting: Meeting, operation: str, size_bytes: int, ranks: Sequence[int], group: Any) -> _Operation:
    """Buffers of whole numbers, small enough that float32 sums of all ranks are exact in any order."""
    count, me = len(ranks), ranks.index(meeting.rank)
    part = max(1, size_bytes // 4 // count)
    whole = part * count

    def of(rank: int, length: int, start: int = 0) -> torch.Tensor:
        # Differs by place and rank: a block that was lost, doubled or swapped shows.
        return _repeated(_pattern(meeting, rank).roll(-(start % PERIOD)), length)

    total = sum((_pattern(meeting, rank) for rank in range(count)), torch.zeros(PERIOD, device=meeting.device))
    mine = of(me, whole)
    if operation == "all_reduce":
        buffer = mine.clone()
        return _Operation(
            lambda: dist.all_reduce(buffer, group=group), lambda: buffer.copy_(mine), buffer, _repeated(total, whole)
        )  # fmt: skip
    if operation == "all_gather":
        output, own = torch.zeros_like(mine), of(me, part)
        expected = torch.cat([of(rank, part) for rank in range(count)])
        run = lambda: _gather_tensor(output, own, group=group)  # noqa: E731
        return _Operation(run, output.zero_, output, expected)
    if operation == "reduce_scatter":
        output = torch.zeros(part, device=meeting.device)
        run = lambda: _scatter_tensor(output, mine, group=group)  # noqa: E731
        return _Operation(run, output.zero_, output, _repeated(total.roll(-(me * part % PERIOD)), part))
    if operation == "all_to_all":
        output = torch.zeros_like(mine)
        expected = torch.cat([of(rank, part, me * part) for rank in range(count)])
        run = lambda: dist.all_to_all_single(output, mine, group=group)  # noqa: E731
        return _Operation(run, output.zero_, output, expected)
    if operation == "broadcast":
        output, root = torch.zeros_like(mine), of(0, whole)

        def reset() -> None:
            output.copy_(root if me == 0 else torch.zeros_like(root))

        return _Operation(lambda: dist.broadcast(output, src=ranks[0], group=group), reset, output, root)
    # Each rank to the next and from the one before, all at once.
    output, before, after = torch.zeros_like(mine), ranks[(me - 1) % count], ranks[(me + 1) % count]

    def exchange() -> None:
        if count == 1:
            output.copy_(mine)
            return
        sends = dist.P2POp(dist.isend, mine, after, group=group)
        receives = dist.P2POp(dist.irecv, output, before, group=group)
        for work in dist.batch_isend_irecv([sends, receives]):
            work.wait()

    return _Operation(exchange, output.zero_, output, of((me - 1) % count, whole))


def _pattern(meeting: Meeting, rank: int) -> torch.Tensor:
    """One period of a rank's values. Periodic, because index arithmetic over gigabytes would not fit beside the buffers."""
    return (torch.arange(PERIOD, device=meeting.device) * 7 + rank * 13).remainder(PERIOD).float()


def _repeated(period: torch.Tensor, length: int) -> torch.Tensor:
    return period.repeat(-(-length // PERIOD))[:length]


def rounds_of_pairs(members: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Every pair once, in rounds in which nobody is in two pairs (the circle method of round-robin tournaments)."""
    circle: list[int | None] = list(members)
    if len(circle) % 2:
        circle.append(None)
    half, rounds = len(circle) // 2, []
    for _ in range(len(circle) - 1):
        met = zip(circle[:half], reversed(circle[half:]), strict=True)
        rounds.append([(a, b) for a, b in met if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def _measure_pairs(meeting: Meeting, settings: CollectiveProbeSettings, faults: Faults, nodes: Sequence[int]) -> None:
    """Send and receive between all pairs, both ways; slow ones again, alone."""
    everyone = list(range(meeting.world_size))
    first_of_each_node = [nodes.index(node) for node in sorted(set(nodes))]
    members = everyone if meeting.world_size <= settings.max_pair_ranks else first_of_each_node
    length = max(1, int(settings.pair_mib * 1024**2 / 4))
    values = _repeated(_pattern(meeting, 0), length)
    buffer = torch.zeros_like(values)
    speeds: dict[tuple[int, int], float] = {}
    for number, pairs in enumerate(rounds_of_pairs(members)):
        for direction in (0, 1):
            meeting.begin(f"pairs, round {number + 1}, {('there', 'back')[direction]}")
            routes = [(b, a) if direction else (a, b) for a, b in pairs]
            found = _routes(meeting, faults, routes, values, buffer)
            speeds |= found
    typical = statistics.median(speeds.values()) if speeds else 0.0
    slow = sorted(route for route, speed in speeds.items() if not speed >= SLOW_PAIR * typical)[:16]
    for route in slow:
        meeting.begin(f"pair {route[0]} to {route[1]} alone")
        again = _routes(meeting, faults, [route], values, buffer)[route]
        speeds[route] = max(speeds[route], again) if again == again else again
    for (source, target), speed in speeds.items():
        if source == meeting.rank:
            meeting.recorder.figure("pair_gbytes_per_s", speed, size_bytes=4 * length, peer=str(target))


def _routes(
    meeting: Meeting, faults: Faults, routes: Sequence[tuple[int, int]], values: torch.Tensor, buffer: torch.Tensor
) -> dict[tuple[int, int], float]:
    """GB/s of each route, all at once, the same on all ranks: bytes by the median time of the receiving rank."""
    size = values.numel() * values.element_size()
    calls = _calls(meeting, size)
    route = next((r for r in routes if meeting.rank in r), None)
    seconds: list[float] = []
    if route is not None:
        source, target = route

        def move() -> None:
            if meeting.rank == source:
                dist.send(values, target)
            else:
                dist.recv(buffer, source)

        buffer.zero_()
        # Also makes NCCL's communicator of the pair, which is no part of the time.
        move()
        meeting.sync()
        if meeting.rank == target and not torch.equal(buffer, values):
            meeting.recorder.problem("pair_correct", f"what came from rank {source} is not what was sent")
        timed = meeting.timed(move, PAIR_REPEATS, faults.before_work, calls=calls)
        seconds = [span / calls for span in faults.seconds(timed)]
    everyone = meeting.gather(seconds)
    return {
        (source, target): size / _slowest([percentile(everyone[source], 0.5), percentile(everyone[target], 0.5)]) / 1e9
        for source, target in routes
    }
