"""The ports of InfiniBand and RoCE adapters, as the kernel tells them."""

from pathlib import Path
from typing import Any

ADAPTERS = Path("/sys/class/infiniband")
BROKEN = ("link_downed", "link_error_recovery", "local_link_integrity_errors")
"""Counters of a link that went down, had to be trained anew, or had more physical errors than its port allows."""
NOISY = (
    "symbol_error",
    "port_rcv_errors",
    "excessive_buffer_overrun_errors",
    "packet_seq_err",
    "local_ack_timeout_err",
)
"""Counters of single errors; the last two are mlx5's own, of RDMA connections. All but those as in Linux'
Documentation/ABI/stable/sysfs-class-infiniband."""
HIGHEST = {
    "link_downed": 255,
    "link_error_recovery": 255,
    "local_link_integrity_errors": 15,
    "excessive_buffer_overrun_errors": 15,
    "symbol_error": 65_535,
    "port_rcv_errors": 65_535,
}
"""Where counters stop and stay until they are set back (their widths: drivers/infiniband/core/sysfs.c)."""


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
