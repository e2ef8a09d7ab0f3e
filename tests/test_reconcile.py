"""What reconcile finds on the storage; what it does to a run that was left is in tests/integration/test_faults.py."""

import json
import logging
import os

import pytest

from flows import reconcile as reconciling
from flows.reconcile import main, reconcile


@pytest.fixture
def look(monkeypatch, caplog):
    """The flow's own function without a server."""
    monkeypatch.setattr(reconciling, "get_run_logger", lambda: logging.getLogger("reconcile"))
    monkeypatch.setattr(reconciling, "create_table_artifact", lambda *_, **__: None)
    caplog.set_level(logging.INFO, "reconcile")
    return lambda storage: {row["run"]: row["done"] for row in reconcile.fn(str(storage), is_dry_run=True)}


def made(storage, name, lease):
    folder = storage / "runs" / name
    folder.mkdir(parents=True)
    (folder / "experiment.json").write_text("{}")
    (folder / "owner.json").write_text(lease)
    os.utime(folder / "owner.json", (0, 0))


LEFT = json.dumps({"flow_run_id": "no id", "host": "elsewhere", "pid": 1, "process": "boot/0"})


@pytest.mark.parametrize(
    ("name", "lease", "said"),
    [
        ("poc (copy)", LEFT, "run='poc (copy)' is not a usable name"),
        ("empty", "", "failed: JSONDecodeError"),
        ("another", "{}", "failed: TypeError"),
    ],
)
def test_an_odd_folder_is_told_and_the_others_have_their_turn(tmp_path, look, name, lease, said):
    made(tmp_path, name, lease)
    made(tmp_path, "left", LEFT)
    found = look(tmp_path)
    assert said in found[name]
    assert found[name].startswith("failed: ")
    # Looked at, and no further: its settings are none.
    assert found["left"] == "failed: KeyError: 'experiment'"


def test_a_folder_without_runs_is_refused_and_never_called_well(tmp_path, look, caplog, capsys):
    missing, new = tmp_path / "missing", tmp_path / "new"
    new.mkdir()
    for folder in (missing, new):
        assert main(["--storage", str(folder)]) == 1
        assert f"error: {folder} has neither runs/ nor checks/" in capsys.readouterr().err
    with pytest.raises(NotADirectoryError, match="--storage"):
        look(missing)
    # Of a new site, whose automations start it before the first run.
    assert look(new) == {}
    assert "has neither runs/ nor checks/" in caplog.text
    assert "is driven" not in caplog.text
    (new / "runs").mkdir()
    look(new)
    assert f"every run and every check in {new} is driven, or has ended" in caplog.text
