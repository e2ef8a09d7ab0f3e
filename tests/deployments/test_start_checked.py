"""What a server or a worker cannot work with keeps it from starting, and the message says what to do; on a real PostgreSQL."""

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.database import Database, mlflows, prefects, problem_of, revisions
from deployments.start_checked import ROOM_GBYTES, problems
from tasks.hardware.host import free_port
from tests.conftest import REPOSITORY
from tests.stack.compose import read_compose

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
needs_postgres = pytest.mark.skipif(
    not BINARIES or os.getuid() != 0, reason="needs Debian's postgresql, and root to start it"
)
needs_mount = pytest.mark.skipif(os.getuid() != 0, reason="needs root to mount a small disk")


def small_disk(folder: Path, megabytes: int):
    """A tmpfs, or a skip where none may be mounted."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    """A server on a disk of its own, so small that it can be filled, with a role and a database."""
    folder = Path("/tmp") / f"proving-ground-start-{os.getpid()}"
    small_disk(folder, 200)
    shutil.chown(folder, "postgres")
    data, port = folder / "data", free_port()
    (folder / "password").write_text("right")
    shutil.chown(folder / "password", "postgres")
    options = ["-D", data, "--auth=scram-sha-256", f"--pwfile={folder / 'password'}", "--no-sync"]
    subprocess.run([BINARIES[-1] / "initdb", *options], user="postgres", cwd="/tmp", check=True, capture_output=True)
    command = [BINARIES[-1] / "postgres", "-D", data, "-p", str(port), "-c", "listen_addresses=127.0.0.1"]
    command += ["-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]
    server = subprocess.Popen(
        command,
        user="postgres",
        cwd="/tmp",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield Database(
            "127.0.0.1", port, "postgres", "postgres", "right", "PGHOST", ("mlflow", "store/db_migrations/versions")
        )
    finally:
        server.terminate()
        server.wait(30)
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def sql(database: Database, statement: str) -> None:
    environment = os.environ | {"PGPASSWORD": database.password}
    where = ["-h", database.host, "-p", str(database.port), "-U", database.user, "-d", database.name]
    subprocess.run([BINARIES[-1] / "psql", *where, "-qc", statement], env=environment, check=True)


@needs_postgres
def test_a_good_database_is_started_on(postgres):
    assert problem_of(postgres) is None


@needs_postgres
def test_a_wrong_password_and_a_missing_database_are_told_at_once_and_never_the_password(postgres):
    said = problem_of(replace(postgres, password="planted-secret"), wait_s=60)
    assert 'password authentication failed for user "postgres"' in said
    assert "alter role" in said
    assert "planted-secret" not in said + repr(replace(postgres, password="planted-secret"))
    assert "databases.sh makes" in problem_of(replace(postgres, name="nowhere"))


def test_a_database_that_does_not_answer_is_waited_for_and_then_told():
    said = problem_of(Database("127.0.0.1", free_port(), "mlflow", "mlflow", "x", "PGHOST"), wait_s=0.1)
    assert "does not answer after 0.1 s (ConnectionRefusedError" in said
    assert "is PostgreSQL running" in said


@needs_postgres
@pytest.mark.parametrize(
    ("revision", "upgrade", "said"),
    [
        ("head", "mlflow db upgrade URI", None),
        (
            "ffffffffffff",
            "mlflow db upgrade URI",
            "was written by another version of mlflow: its schema is ffffffffffff",
        ),
        ("older", "mlflow db upgrade URI", "make a backup, then run 'mlflow db upgrade URI'"),
        ("older", None, None),
    ],
)
def test_a_schema_of_another_version_is_told_apart_from_one_to_upgrade(postgres, revision, upgrade, said):
    known, head = revisions("mlflow", "store/db_migrations/versions")
    number = {"head": head, "older": min(known - {head})}.get(revision, revision)
    sql(postgres, f"create table alembic_version as select '{number}' as version_num")
    try:
        found = problem_of(replace(postgres, upgrade=upgrade))
    finally:
        sql(postgres, "drop table alembic_version")
    assert found is None if said is None else said in found


@needs_postgres
def test_a_full_volume_of_the_database_is_told(postgres):
    folder = Path("/tmp") / f"proving-ground-start-{os.getpid()}"
    filler = folder / "filler"
    with filler.open("wb") as out:
        # All but a few megabytes, so that PostgreSQL itself can go on.
        out.write(b"\0" * (shutil.disk_usage(folder).free - 6_000_000))
    try:
        said = problem_of(postgres)
    finally:
        filler.unlink()
    assert "its volume is full" in said
    assert "16 MB are wanted" in said
    assert problem_of(postgres) is None


@pytest.mark.parametrize(
    ("package", "folder"),
    [("mlflow", "store/db_migrations/versions"), ("prefect", "server/database/_migrations/versions/postgresql")],
)
def test_the_revisions_that_are_read_as_text_are_alembics(package, folder):
    # As a process: Prefect's migrations, loaded by alembic, change modules of Prefect.
    code = (
        "import importlib.util, pathlib; from alembic.script import ScriptDirectory;"
        f"versions = pathlib.Path(importlib.util.find_spec('{package}').submodule_search_locations[0], '{folder}');"
        "script = ScriptDirectory(str(versions.parent), version_locations=[str(versions)]);"
        "print(script.get_current_head(), *(r.revision for r in script.walk_revisions()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    head, *every = done.stdout.split()
    assert revisions(package, folder) == (set(every), head)


def compose(service: str, **values: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """What compose.yaml starts checked: the command behind the check, and the environment."""
    found = read_compose(values)[service]
    assert found.command[:3] == ("python", "-m", "deployments.start_checked")
    return found.command[3:], dict(found.environment)


def test_compose_names_the_databases_that_are_looked_at():
    _, prefect = compose("prefect")
    _, mlflow = compose("mlflow")
    assert str(prefects(prefect)).startswith("database prefect on postgres:5432 as prefect")
    assert str(mlflows(mlflow)).startswith("database mlflow on postgres:5432 as mlflow")
    assert mlflows(mlflow).upgrade == "mlflow db upgrade postgresql+psycopg2:///mlflow"
    mlflow["MLFLOW_BACKEND_STORE_URI"] += "?sslmode=require"
    assert mlflows(mlflow).name == "mlflow"


@pytest.mark.parametrize(
    ("service", "missing"), [("prefect", "PREFECT_SERVER_DATABASE_HOST"), ("mlflow", "PGHOST"), ("mlflow", "PGUSER")]
)
def test_a_variable_without_which_a_database_cannot_be_reached_is_named(service, missing):
    command, environment = compose(service, BIND="127.0.0.1", **{f"{service.upper()}_PORT": str(free_port())})
    del environment[missing]
    environment = {name: value for name, value in environment.items() if name not in ROOM_GBYTES}
    [said] = problems(command, environment)
    assert f"names a PostgreSQL and {missing} is not set" in said


@pytest.mark.parametrize("service", ["prefect", "mlflow"])
def test_a_port_that_is_taken_keeps_a_server_from_starting(service, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        values = {"BIND": "127.0.0.1", f"{service.upper()}_PORT": port, "HOME_FOLDER": str(tmp_path)}
        command, _ = compose(service, **values)
        [said] = problems(command, {})
    assert f"--port {port} cannot be listened on (Address already in use)" in said
    assert "ss -ltnp" in said
    assert list(problems(command, {})) == []


@needs_mount
@pytest.mark.parametrize("name", ROOM_GBYTES)
def test_a_full_volume_of_a_server_is_told(tmp_path, name):
    disk = tmp_path / "disk"
    small_disk(disk, 20)
    try:
        command, _ = compose("mlflow", BIND="127.0.0.1", MLFLOW_PORT=str(free_port()))
        [said] = problems(command, {name: str(disk / "inside")})
    finally:
        subprocess.run(["umount", disk], check=True)
    assert f"{name}={disk / 'inside'}: 0.02 GB are free and {ROOM_GBYTES[name]:g} GB are wanted" in said


def test_artifacts_in_object_storage_are_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, _ = compose("mlflow", BIND="127.0.0.1", MLFLOW_PORT=str(free_port()))
    assert list(problems(command, {"MLFLOW_ARTIFACTS_DESTINATION": "s3://bucket/artifacts"})) == []
    assert list(tmp_path.iterdir()) == []


def test_a_worker_is_not_started_where_its_servers_do_not_answer(monkeypatch):
    dead = free_port()
    command, _ = compose("worker")
    environment = {"PREFECT_API_URL": f"http://127.0.0.1:{dead}/api", "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{dead}"}
    done = subprocess.run(
        [sys.executable, "-m", "deployments.start_checked", *command],
        cwd=REPOSITORY,
        env=os.environ | environment | {"PREFECT_CLIENT_MAX_RETRIES": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "error: prefect worker start was not started:" in done.stderr
    assert f"PREFECT_API_URL=http://127.0.0.1:{dead}/api/ does not answer" in done.stderr
    assert f"MLFLOW_TRACKING_URI=http://127.0.0.1:{dead} does not answer" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_looked_at_becomes_the_command_and_a_stranger_is_refused(tmp_path):
    # Told from the check by what it prints: a stand-in for mlflow, found first.
    (tmp_path / "mlflow").write_text("#!/bin/sh\necho started: $*\n")
    (tmp_path / "mlflow").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "deployments.start_checked"]
    port = str(free_port())
    done = subprocess.run(
        [*command, "mlflow", "server", "--host", "127.0.0.1", "--port", port],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == f"started: server --host 127.0.0.1 --port {port}\n"
    with pytest.raises(ValueError, match="'mlflow ui' is not 'prefect server start'"):
        list(problems(["mlflow", "ui"], {}))
