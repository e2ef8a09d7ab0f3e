"""What several tests need: real rows, the embedded model, small pools."""

import json
from pathlib import Path

import pytest

from tasks.contracts.settings import ModelSettings

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


@pytest.fixture(scope="session")
def glaive_rows() -> list[dict]:
    """300 real rows of glaive-function-calling-v2 in ShareGPT form."""
    path = SHARED_DATA / "glaive_toolcall_en_demo.json"
    if not path.exists():
        pytest.skip(f"real rows are not here: {path}")
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def model_storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage root in which the embedded model has been converted once for all tests."""
    from tasks.models.materialise import materialise

    storage = tmp_path_factory.mktemp("models")
    materialise(ModelSettings(name="embedded"), storage)
    return storage


@pytest.fixture(scope="session")
def embedded_model(model_storage: Path) -> Path:
    """The folder of the embedded model."""
    from tasks.models.materialise import materialise

    return materialise(ModelSettings(name="embedded"), model_storage)
