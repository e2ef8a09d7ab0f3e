"""A port for a server of ours must still be free when the server comes to it."""

import socket

import pytest

from tasks.hardware import host


@pytest.fixture
def given_out(monkeypatch, tmp_path):
    def set_range(lowest: int, highest: int) -> None:
        (tmp_path / "range").write_text(f"{lowest}\t{highest}\n")
        monkeypatch.setattr(host, "GIVEN_OUT", tmp_path / "range")

    return set_range


def test_the_kernel_gives_such_a_port_to_nobody_by_itself(given_out):
    given_out(20_100, 60_999)
    assert all(20_000 <= host.free_port() < 20_100 for _ in range(20))


def test_where_the_kernel_gives_all_out_it_is_one_of_them(given_out):
    given_out(1024, 65_535)
    assert host.free_port() in host.PORTS


def test_a_port_that_is_taken_is_not_given(monkeypatch):
    with socket.socket() as server:
        server.bind((host.LOOPBACK, host.free_port()))
        server.listen()
        taken = server.getsockname()[1]
        monkeypatch.setattr(host, "PORTS", range(taken, taken + 1))
        with pytest.raises(OSError, match=f"ports between {taken} and {taken} were tried, and all are taken"):
            host.free_port()
    assert host.free_port() == taken
