"""What this machine's system gives a process that starts others."""

import ctypes
import signal
import socket

LOOPBACK = "127.0.0.1"
PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """For ``preexec_fn``: the kernel sends this child SIGTERM when the one that started it is gone, however that ended."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port
