"""Servers, storage and one finished run that the integration tests share."""

from pathlib import Path

import pytest

from flows.local_stack import Addresses, temporary_stack
from tests.integration.finetune_process import finish, start
from tests.integration.planted import PLANTED, sampled_arguments


@pytest.fixture(scope="session")
def storage(model_storage) -> Path:
    return model_storage


@pytest.fixture(scope="session")
def stack(storage):
    with temporary_stack(storage) as addresses:
        yield addresses


@pytest.fixture(scope="session")
def first_run(storage: Path, stack: Addresses) -> tuple[int, str, Path]:
    """One run from rows to report: exit status, output, and what ``latest`` named when it had ended."""
    with sampled_arguments(storage):
        code, output = finish(start(storage, stack, "first", secrets=PLANTED))
    return code, output, (storage / "runs" / "latest").resolve()
