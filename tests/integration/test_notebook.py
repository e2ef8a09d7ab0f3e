"""The notebook runs on a finished run, from its first cell to its last."""

import json
import os
import subprocess
import sys

import pytest

from flows.local_stack import REPOSITORY

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]
NOTEBOOK = REPOSITORY / "notebooks" / "compare_runs.ipynb"


def test_the_notebook_shows_a_finished_run_and_holds_no_output(first_run, stack, tmp_path):
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    # What somebody ran belongs to nobody else.
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    script = tmp_path / "notebook.py"
    script.write_text("\n".join("".join(cell["source"]) for cell in cells))
    env = os.environ | {"MLFLOW_TRACKING_URI": stack.mlflow, "RUNS": "first", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "first: FAIL" in done.stdout
    assert "eval/exact_match" in done.stdout
    assert "expected" in done.stdout
