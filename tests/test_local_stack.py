"""How the commands that start servers and jobs end, and what keeps them from starting."""

import os
import signal
import socket
import sqlite3
import subprocess
from contextlib import closing

import pytest

from flows.local_stack import StackError, _check_port, _Server, _start, _wait_for, end_as_with_ctrl_c, temporary_stack


@pytest.fixture(autouse=True)
def handlers_are_put_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_told_to_end_ends_as_with_ctrl_c(number):
    # Whatever these tests run under: nohup would have SIGHUP ignored.
    signal.signal(number, signal.SIG_DFL)
    end_as_with_ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)


def test_what_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    end_as_with_ctrl_c()
    signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to mount a small disk")
def test_servers_are_not_started_on_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(StackError, match=r"0\.02 GB are free and the servers want 0\.5 GB"), temporary_stack(disk):
            pass
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StackError, match="file/servers cannot be made: .*choose another --storage"),
        temporary_stack(tmp_path / "file"),
    ):
        pass


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("alembic.util.exc.CommandError: Can't locate revision identified by 'ffff'", "was written by another version"),
        (
            "MlflowException: Detected out-of-date database schema (found version a, but",
            "was written by another version",
        ),
        (
            "ConnectionRefusedError: [Errno 111] Connect call failed ('127.0.0.1', 5432)",
            "names a database that does not",
        ),
        ('asyncpg.Error password authentication failed for user "prefect"', "refuses its password"),
        ("sqlite3.OperationalError: database or disk is full", "is full: free some"),
    ],
)
def test_a_server_that_ends_is_told_with_what_to_do(tmp_path, line, said):
    log = tmp_path / "server.log"
    log.write_text(f"{line}\nApplication startup failed. Exiting.\n")
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(StackError, match="the Prefect server ended at once") as caught:
        _wait_for(_Server("Prefect", process, "http://127.0.0.1:1/api/health", log, 0))
    assert said in str(caught.value).splitlines()[-1]


def test_what_an_earlier_start_wrote_is_no_reason_of_this_one(tmp_path):
    log = tmp_path / "server.log"
    log.write_text("alembic.util.exc.CommandError: Can't locate revision identified by 'ffff'\n")
    command = ["sh", "-c", "echo 'ImportError: no such module'; exit 1"]
    server = _start("Prefect", command, {}, "http://127.0.0.1:1/api/health", log)
    server.process.wait()
    with pytest.raises(StackError) as caught:
        _wait_for(server)
    assert str(caught.value).splitlines()[1:] == ["ImportError: no such module"]


@pytest.mark.integration
def test_a_database_of_a_later_version_is_told_and_left_as_it_is(tmp_path):
    with temporary_stack(tmp_path):
        pass
    with closing(sqlite3.connect(tmp_path / "servers" / "mlflow.db")) as database, database:
        database.execute("update alembic_version set version_num = 'ffffffffffff'")
    with pytest.raises(StackError, match="the MLflow server ended at once") as caught, temporary_stack(tmp_path):
        pass
    assert "was written by another version" in str(caught.value).splitlines()[-1]


def test_a_taken_port_is_told_with_how_to_find_its_owner():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(StackError, match="is taken.*ss -ltnp"):
            _check_port("Prefect", other.getsockname()[1])
