"""The ports of InfiniBand and RoCE adapters, as the kernel tells them."""

from pathlib import Path
from typing import Any


def ports(root: Path) -> list[dict[str, Any]]:
    """Each port below ``/sys/class/infiniband``: device, port, link layer, state, rate in Gb/s and error counters.

    A file that cannot be read or understood gives None, never a good value.
    """
    found = []
    for port in sorted(root.glob("*/ports/*")):
        rate = (_read(port / "rate") or "").split()
        found.append(
            {
                "device": port.parents[1].name,
                "port": port.name,
                "link_layer": _read(port / "link_layer"),
                "state": (_read(port / "state") or "").partition(": ")[2] or None,
                "rate_gbits_per_s": float(rate[0]) if rate and rate[0].replace(".", "", 1).isdigit() else None,
                "link_downed": _number(port / "counters" / "link_downed"),
                "symbol_error": _number(port / "counters" / "symbol_error"),
            }
        )
    return found


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text is not None and text.isdigit() else None
