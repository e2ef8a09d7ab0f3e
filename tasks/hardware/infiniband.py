"""The ports of InfiniBand and RoCE adapters, as the kernel tells them."""

from pathlib import Path
from typing import Any

ADAPTERS = Path("/sys/class/infiniband")
BROKEN = ("link_downed", "link_error_recovery", "local_link_integrity_errors", "excessive_buffer_overrun_errors")
"""Counters of a link that failed or had to be trained anew (Linux, Documentation/ABI/stable/sysfs-class-infiniband)."""
NOISY = ("symbol_error", "port_rcv_errors", "packet_seq_err", "local_ack_timeout_err")
"""Counters of what got lost and came again: it costs bandwidth. The last two are mlx5's own, of RDMA connections."""


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
                **{name: _counter(port, name) for name in BROKEN + NOISY},
            }
        )
    return found


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _counter(port: Path, name: str) -> int | None:
    text = _read(port / "counters" / name) or _read(port / "hw_counters" / name)
    return int(text) if text is not None and text.isdigit() else None
