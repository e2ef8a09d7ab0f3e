"""Models of the hub lie on shared storage, where every node and the next run find them."""

import huggingface_hub.constants
import pytest

from tasks.contracts.settings import ModelSettings
from tasks.models.identity import ModelNotFound
from tasks.models.materialise import materialise

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def without_a_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_model_that_one_node_downloaded_is_the_others_too(tmp_path):
    # As the hub's library leaves a download; offline it finds one only where it would have put it.
    repository = tmp_path / "models" / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (snapshot / "model.safetensors").write_bytes(b"weights")
    assert materialise(ModelSettings(name="org/name"), tmp_path) == snapshot


def test_a_model_that_is_nowhere_is_told_with_what_to_check(tmp_path):
    with pytest.raises(ModelNotFound, match="cannot be had from the hub"):
        materialise(ModelSettings(name="org/name"), tmp_path)
