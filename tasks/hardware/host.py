"""What this machine's system gives a process that starts others."""

import ctypes
import errno
import secrets
import signal
import socket

LOOPBACK = "127.0.0.1"
PR_SET_PDEATHSIG = 1
PORTS = range(20_000, 30_000)
"""Below Kubernetes' node ports (30000 on) and those that Linux gives out by itself (32768 on)."""
MOST_TRIES = 100


def end_with_parent() -> None:
    """For ``preexec_fn``: the kernel sends this child SIGTERM when the one that started it is gone, however that ended."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on at this moment, and that the kernel gives nobody unasked.

    Of those that it gives out by itself another process may get the same one before it is used: each connection takes one.

    Raises:
        OSError: none was found.
    """
    for port in secrets.SystemRandom().sample(PORTS, k=min(MOST_TRIES, len(PORTS))):
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
