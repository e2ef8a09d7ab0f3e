"""What this machine's system gives a process that starts others."""

import ctypes
import errno
import secrets
import signal
import socket
from pathlib import Path

LOOPBACK = "127.0.0.1"
PR_SET_PDEATHSIG = 1
PORTS = range(20_000, 29_000)
"""Below torchrun's own (29400, 29500), Kubernetes' node ports (30000 on) and those that Linux usually gives out (32768 on)."""
GIVEN_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")
MOST_TRIES = 100


def end_with_parent() -> None:
    """For ``preexec_fn``: the kernel sends this child SIGTERM when the one that started it is gone, however that ended."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on at this moment.

    Where it can be, one that the kernel gives nobody unasked: of those another process may get the same one before it is used,
    as each connection takes one.

    Raises:
        OSError: none was found.
    """
    lowest, highest = map(int, GIVEN_OUT.read_text().split())
    ports = [port for port in PORTS if not lowest <= port <= highest] or PORTS
    for port in secrets.SystemRandom().sample(ports, k=min(MOST_TRIES, len(ports))):
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return port
    raise OSError(
        errno.EADDRINUSE, f"{MOST_TRIES} ports between {PORTS[0]} and {PORTS[-1]} were tried, and all are taken"
    )
