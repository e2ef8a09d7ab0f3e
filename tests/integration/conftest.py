"""Servers, storage and one finished run that the integration tests share."""

import subprocess
from collections.abc import Callable
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
def small_model(embedded_model: Path, storage: Path) -> Path:
    """The embedded model's first four layers: what happens to a run is the same, and each stage takes seconds."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = storage / "models" / "four-layers"
    AutoModelForCausalLM.from_pretrained(embedded_model, num_hidden_layers=4).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def start_small(small_model: Path, storage: Path, stack: Addresses) -> Callable[..., subprocess.Popen]:
    """Starts a run of the small model under a name, with settings of its own, on one node unless they say otherwise."""

    def begin(run: str, **settings: object) -> subprocess.Popen:
        model = {"model__name": small_model, "model__family": "smollm2", "training__lora__first_layer": 0}
        return start(storage, stack, run, **model | {"pool__num_nodes": 1} | settings)

    return begin


@pytest.fixture(scope="session")
def first_run(start_small: Callable[..., subprocess.Popen], storage: Path) -> tuple[int, str, Path]:
    """One run from rows to report on two nodes: exit status, output, and what ``latest`` named when it had ended.

    Later runs reuse its dataset and its baseline.
    """
    with sampled_arguments(storage):
        code, output = finish(start_small("first", pool__num_nodes=2, secrets=PLANTED))
    return code, output, (storage / "runs" / "latest").resolve()
