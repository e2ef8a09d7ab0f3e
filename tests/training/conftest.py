"""The toy training that several tests do things to."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training import toy
from tests.training.toy_ranks import ToyJob


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's model and rows."""
    root = tmp_path_factory.mktemp("toy")
    toy.make_model(root / "model")
    toy.make_rows(root / "dataset")
    return root


@pytest.fixture
def toy_job(home: Path, tmp_path: Path) -> Callable[..., ToyJob]:
    """Makes a job of its own, with some settings changed."""

    def make(name: str = "run", **changes: object) -> ToyJob:
        root = tmp_path / name
        return ToyJob(root, toy.arguments(root, home / "model", home / "dataset", **changes))

    return make


@pytest.fixture(scope="session")
def unbroken(home: Path, tmp_path_factory: pytest.TempPathFactory) -> ToyJob:
    """The run that nothing happens to: two ranks from end to end, the whole base on each."""
    root = tmp_path_factory.mktemp("unbroken")
    job = ToyJob(root, toy.arguments(root, home / "model", home / "dataset"))
    job.run(2)
    return job
