"""No secret of a run's environment is in anything that the run leaves."""

import base64

import pytest

from tests.integration.planted import ARGUMENTS, SECRETS, files_with

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def test_planted_secrets_are_in_no_file_no_output_and_no_argument(first_run, storage):
    _, output, _ = first_run
    assert any("tasks.pool" in arguments for arguments in ARGUMENTS), "no process was seen: nothing was searched"
    # Manifests, specifications, logs of ranks and servers, Prefect's and MLflow's databases, artifacts.
    for folder in ("runs", "servers"):
        assert any((storage / folder).iterdir())
    for secret in SECRETS:
        assert secret not in output
        assert not [arguments for arguments in ARGUMENTS if secret in arguments]
        assert files_with(storage / "runs", secret) == []
        assert files_with(storage / "servers", secret) == []


@pytest.mark.parametrize(
    "form", [lambda s: s, lambda s: "prefix" + s + "suffix", lambda s: base64.b64encode(f"admin:{s}".encode()).decode()]
)
def test_the_search_finds_a_secret_that_is_there(tmp_path, form):
    (tmp_path / "log").write_text(form(SECRETS[0]))
    assert files_with(tmp_path, SECRETS[0]) == [tmp_path / "log"]
