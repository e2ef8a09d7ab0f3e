"""How near a node's GPUs and network adapters are to each other: the tree of PCIe bridges and sockets, as Linux shows it.

In the words of ``nvidia-smi topo -m``: PIX across one PCIe switch, PXB across several, PHB across a processor's host bridge, NODE
across several of those on one NUMA node, SYS between NUMA nodes. NVLinks are counted with the GPUs (``nvml.py``).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SYSFS = Path("/sys")
Level = Literal["PIX", "PXB", "PHB", "NODE", "SYS"]
MOST_IN_A_SWITCH = 2
"""Steps from a switch's upper port to a device behind it: a lower port, and the device."""


@dataclass(frozen=True)
class Place:
    """Where a device is.

    Attributes:
        path: the host bridge, every bridge below it, last the device itself.
        numa_node: -1: not told.
    """

    path: tuple[str, ...]
    numa_node: int


def near(gpus: Sequence[str | None], *, sysfs: Path = SYSFS) -> list[dict[str, Any] | None]:
    """How many other GPUs, and how many RDMA adapters, are how near to each of some GPUs.

    Args:
        gpus: their bus ids as NVML tells them (``00000000:18:00.0``); None: not told.

    Returns:
        ``{"numa_node": 0, "gpus": {"NODE": 3, "SYS": 4}, "adapters": {"PIX": 1, "SYS": 7}}`` for each; None where the
        device tree does not show it. An adapter of software alone has no place and is not counted.
    """
    places = [place_of(_device(bus_id, sysfs)) if bus_id else None for bus_id in gpus]
    adapters = [place_of(port / "device") for port in sorted((sysfs / "class" / "infiniband").glob("*"))]
    return [
        {
            "numa_node": place.numa_node,
            "gpus": _levels(place, [*places[:number], *places[number + 1 :]]),
            "adapters": _levels(place, adapters),
        }
        if place
        else None
        for number, place in enumerate(places)
    ]


def place_of(device: Path) -> Place | None:
    """The place of a device's folder in ``/sys``; None: it is not there, or hangs on no PCIe bus."""
    try:
        parts = device.resolve(strict=True).parts
    except OSError:
        return None
    first = next((number for number, part in enumerate(parts) if part.startswith("pci")), None)
    if first is None:
        return None
    try:
        numa_node = int((device / "numa_node").read_text())
    except (OSError, ValueError):
        numa_node = -1
    return Place(parts[first:], numa_node)


def distance(one: Place, other: Place) -> Level:
    """How near two devices are to each other."""
    common = next(
        (number for number, (a, b) in enumerate(zip(one.path, other.path, strict=False)) if a != b),
        min(len(one.path), len(other.path)),
    )
    if common == 0:
        return "NODE" if one.numa_node == other.numa_node else "SYS"
    if common == 1:
        return "PHB"
    return "PIX" if max(len(one.path), len(other.path)) - common <= MOST_IN_A_SWITCH else "PXB"


def _levels(place: Place, others: Sequence[Place | None]) -> dict[str, int]:
    return dict(sorted(Counter(distance(place, other) for other in others if other).items()))


def _device(bus_id: str, sysfs: Path) -> Path:
    # NVML's domain has eight digits, Linux' four.
    domain, _, rest = bus_id.partition(":")
    return sysfs / "bus" / "pci" / "devices" / f"{domain[-4:]}:{rest}".lower()
