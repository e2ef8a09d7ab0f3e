"""What several tests need: real rows, the embedded model, small pools."""

import json
from pathlib import Path

import pytest

from tasks.contracts.settings import ModelSettings

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
SHARE_A_RUN = {"test_faults", "test_finetune", "test_notebook", "test_secrets"}
"""Of the integration tests: those that read one finished run, which is made once a process."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With ``-n 2 --dist loadgroup`` a file is one process's, because its fixtures are costly, and a run's readers are too."""
    for item in items:
        name = "a run" if item.path.stem in SHARE_A_RUN else str(item.path.relative_to(REPOSITORY))
        item.add_marker(pytest.mark.xdist_group(name))
    # They take as long as most others together: whoever waits for them at the end waits least when they begin at once.
    items.sort(key=lambda item: item.path.stem not in SHARE_A_RUN)


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
