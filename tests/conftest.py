"""What several tests need: real rows, the embedded model, small pools."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.settings import ModelSettings

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
SHARE_A_RUN = {"test_faults", "test_finetune", "test_notebook", "test_secrets"}
"""Of the integration tests: those that read one finished run, which is made once a process."""


def pytest_configure() -> None:
    # What a test says of a processor holds on a machine with GPUs too; those marked gpu are run by make test-gpu. Not where
    # this file is only imported, as the benchmarks do.
    if os.environ.get("PROVING_GROUND_TEST_GPU") != "1":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Beside another process of tests, threads of both would wait for each other's processors without letting go of them.
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # They take as long as most others together: with them first two processes end at nearly the same time.
    items.sort(key=lambda item: item.path.stem not in SHARE_A_RUN)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a GPU: make test-gpu"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n 2`` a file is one process's, because its fixtures are costly; the readers of a run are one process's too.

    (Marks of groups do not do: pytest-xdist 3.8 writes them into identifiers that pytest 9.2 no longer lets it write.)
    """
    from xdist.scheduler import LoadFileScheduling

    class ByFileAndRun(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "a run" if Path(file).stem in SHARE_A_RUN else file

    return ByFileAndRun(config, log)


@pytest.fixture(scope="session")
def glaive_rows() -> list[dict]:
    """300 real rows of glaive-function-calling-v2 in ShareGPT form."""
    path = SHARED_DATA / "glaive_toolcall_en_demo.json"
    if not path.exists():
        pytest.skip(f"real rows are not here: {path}")
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def model_storage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage root with the embedded model, which has been converted once for all processes of tests."""
    from tasks.models.materialise import materialise

    storage, own = tmp_path_factory.mktemp("models"), tmp_path_factory.getbasetemp()
    is_one_of_several = hasattr(request.config, "workerinput")
    converted = materialise(ModelSettings(name="embedded"), own.parent if is_one_of_several else own)
    (storage / "models").mkdir()
    (storage / "models" / converted.name).symlink_to(converted)
    return storage


@pytest.fixture(scope="session")
def embedded_model(model_storage: Path) -> Path:
    """The folder of the embedded model."""
    from tasks.models.materialise import materialise

    return materialise(ModelSettings(name="embedded"), model_storage)
