"""A port for a server of ours must still be free when the server comes to it."""

import socket
from pathlib import Path

import pytest

from tasks.hardware import host


def test_the_kernel_gives_such_a_port_to_nobody_by_itself():
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(host.free_port() for _ in range(20)) < lowest


def test_a_port_that_is_taken_is_not_given(monkeypatch):
    with socket.socket() as server:
        server.bind((host.LOOPBACK, 0))
        server.listen()
        taken = server.getsockname()[1]
        monkeypatch.setattr(host, "PORTS", range(taken, taken + 1))
        with pytest.raises(OSError, match=f"ports between {taken} and {taken} were tried, and all are taken"):
            host.free_port()
    assert host.free_port() == taken
