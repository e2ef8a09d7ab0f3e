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
NVIDIA, DISPLAYS = "0x10de", ("0x0300", "0x0302")
"""PCI's number of the vendor, and its classes of GPUs: with and without a display."""
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


def near(sysfs: Path = SYSFS) -> list[dict[str, Any]]:
    """How many other GPUs, and how many RDMA adapters, are how near to each GPU of this node, in the order of their bus ids.

    All that Linux shows are told, whichever of them this job was given: they are what nodes are compared by.

    Returns:
        ``{"bus_id": "0000:18:00.0", "gpus": {"NODE": 3, "SYS": 4}, "adapters": {"PIX": 1, "SYS": 7}}`` for each; none where
        the tree of devices is not shown. An adapter of software alone has no place and is not counted.
    """
    found = {
        folder.name: place_of(folder)
        for folder in sorted((sysfs / "bus" / "pci" / "devices").glob("*"))
        if _is_gpu(folder)
    }
    gpus = {bus_id: place for bus_id, place in found.items() if place}
    adapters = [place_of(port / "device") for port in sorted((sysfs / "class" / "infiniband").glob("*"))]
    return [
        {
            "bus_id": bus_id,
            "gpus": _levels(place, [other for other in gpus.values() if other is not place]),
            "adapters": _levels(place, adapters),
        }
        for bus_id, place in gpus.items()
    ]


def _is_gpu(device: Path) -> bool:
    try:
        vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
    except OSError:
        return False
    return vendor == NVIDIA and kind.startswith(DISPLAYS)


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
