"""``python -m flows.cluster_check``: an earlier check's word is never this one's."""

import json

import pytest
from prefect.states import Failed

from flows.cluster_check import ERROR, _tell, check_name
from tasks.contracts.overrides import SettingsError
from tasks.contracts.run_folder import CheckFolder
from tasks.contracts.settings import StorageSettings


@pytest.fixture
def folder(tmp_path):
    """Of a check that was made before, and passed."""
    folder = CheckFolder(StorageSettings(shared=str(tmp_path)), "mine")
    folder.report.mkdir(parents=True)
    (folder.root / "check.json").write_text(json.dumps({"flow_run_id": "first"}))
    (folder.report / "cluster-check.json").write_text("{}")
    return folder


def test_a_name_that_is_taken_is_refused_and_a_retry_of_its_flow_run_is_not(folder):
    with pytest.raises(SettingsError, match="there is a check mine in .* give another --run"):
        check_name(folder)
    with pytest.raises(SettingsError, match="mine"):
        check_name(folder, "second")
    check_name(folder, "first")


def test_a_check_that_crashed_is_an_error_whatever_report_lies_there(folder, capsys):
    assert _tell(Failed(message="boom"), folder) == ERROR
    assert "the check failed: boom" in capsys.readouterr().err
