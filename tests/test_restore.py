"""A backup that cannot be read costs no database: restore.sh reads every dump to its end before it drops anything.

PostgreSQL's programs are stood in for by a script that notes how it was called; `make stack-test PART=backup` restores real ones.
"""

import os
import subprocess

import pytest

from tests.conftest import REPOSITORY

RESTORE = REPOSITORY / "infra" / "databases" / "restore.sh"
PROGRAM = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
case "$(basename "$0") $*" in
    "pg_restore --list"*) echo "1; 2 3 TABLE runs" ;;
    "pg_restore --file=/dev/null $UNREADABLE") echo "pg_restore: error: end of file" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def restore(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("pg_restore", "dropdb", "createdb", "psql"):
        (programs / name).write_text(PROGRAM)
        (programs / name).chmod(0o755)
    dumps = tmp_path / "dumps"
    dumps.mkdir()
    calls = tmp_path / "calls"

    def run(unreadable: str = "none") -> tuple[subprocess.CompletedProcess[str], list[str]]:
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        env = {"PATH": path, "CALLS": str(calls), "UNREADABLE": str(dumps / unreadable)}
        done = subprocess.run(["sh", str(RESTORE), str(dumps)], env=env, capture_output=True, text=True, check=False)
        return done, calls.read_text().splitlines()

    return run


@pytest.mark.parametrize("unreadable", ["prefect.dump", "mlflow.dump", "mlflow_auth.dump"])
def test_a_dump_that_was_cut_is_found_before_anything_is_dropped(restore, unreadable):
    done, calls = restore(unreadable)
    assert done.returncode != 0
    assert "end of file" in done.stderr
    assert calls
    assert all(call.startswith("pg_restore --file=/dev/null") for call in calls)


def test_sound_dumps_are_restored_each_as_its_own_role(restore):
    done, calls = restore()
    assert done.returncode == 0, done.stderr
    first_drop = next(number for number, call in enumerate(calls) if call.startswith("dropdb"))
    assert first_drop == 3
    assert [call for call in calls if call.startswith("createdb")] == [
        "createdb --owner prefect prefect",
        "createdb --owner mlflow mlflow",
        "createdb --owner mlflow mlflow_auth",
    ]
    restored = [call for call in calls if "--exit-on-error" in call]
    assert [call.rpartition("/")[2] for call in restored] == ["prefect.dump", "mlflow.dump", "mlflow_auth.dump"]


def test_a_folder_that_is_not_given_is_asked_for():
    done = subprocess.run(["sh", str(RESTORE)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "usage: restore.sh FOLDER" in done.stderr
