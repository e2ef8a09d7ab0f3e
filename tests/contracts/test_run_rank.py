"""The frame of a rank, in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from flows.local_stack import REPOSITORY


@pytest.fixture
def run(tmp_path):
    """Runs a module's ``main`` as a rank; returns its exit status, its result and the message that it left."""
    attempt = tmp_path / "job" / "001"
    attempt.mkdir(parents=True)
    (attempt / "spec.json").write_text("{}")
    (attempt.parent / "NEWEST").write_text("001")

    def begin(name: str) -> tuple[int, dict | None, str]:
        error, result = tmp_path / "error.json", attempt / "result.json"
        code = f"import sys; from tasks.contracts.attempt import run_rank; run_rank({name!r}, ['rank', sys.argv[1]])"
        done = subprocess.run(
            [sys.executable, "-c", code, str(attempt / "spec.json")],
            cwd=REPOSITORY,
            env=os.environ | {"TORCHELASTIC_ERROR_FILE": str(error), "PYTHONPATH": str(tmp_path)},
            capture_output=True,
        )
        told = json.loads(error.read_text())["message"]["message"] if error.exists() else ""
        return done.returncode, json.loads(result.read_text()) if result.exists() else None, told

    return begin


def test_what_cannot_be_imported_is_the_ranks_own_error(run, tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_library\n")
    code, result, told = run("broken:main")
    assert (code, result) == (1, None)
    assert told == "ModuleNotFoundError: No module named 'no_such_library'"


def test_garbage_is_looked_for_among_what_the_program_makes_and_not_among_what_it_imports(run, tmp_path):
    (tmp_path / "program.py").write_text(
        "import gc\n"
        "while_imported, imported = gc.isenabled(), [[]]\n"
        "def main(attempt):\n"
        "    made = [[]]\n"
        "    seen = [any(one is each for each in gc.get_objects()) for one in (imported, made)]\n"
        "    return {'while_imported': while_imported, 'later': gc.isenabled(), 'seen': seen}\n"
    )
    code, result, told = run("program:main")
    assert (code, told) == (0, "")
    assert {name: result[name] for name in ("while_imported", "later", "seen")} == {
        "while_imported": False,
        "later": True,
        "seen": [False, True],
    }
