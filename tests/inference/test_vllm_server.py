"""A server of a rank's own: started with what it must know, waited for, and gone afterwards, whatever happens to it."""

import json
import sys
from pathlib import Path

import psutil
import pytest
from pydantic import ValidationError

from tasks.contracts.settings import InferenceSettings, VllmSettings
from tasks.inference.endpoint import Endpoint
from tasks.inference.vllm_server import ServerProblem, serving
from tests.inference.test_endpoint import EXAMPLES, FAMILY, Tokens

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Serves with the stand-in; ``fails`` says when it shall not."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("fake_vllm.py")} "$@"\n')
    python.chmod(0o755)
    for name, value in {"RANK": "1", "MASTER_ADDR": "elsewhere", "LOCAL_RANK": "0", "PYTHONPATH": "/ours"}.items():
        monkeypatch.setenv(name, value)

    def begin(adapter=None, fails="", device=None, **settings):
        monkeypatch.setenv("FAKE_VLLM", fails)
        # Other tests have engines at the same time.
        monkeypatch.setenv("FAKE_VLLM_ENGINE", str(tmp_path))
        return serving(
            VllmSettings(python=str(python), **settings), tmp_path / "base", adapter, precision="float32",
            max_tokens=300, device=device, log=tmp_path / "vllm-1.log",
        )  # fmt: skip

    yield begin
    left = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[-1:] == [str(tmp_path)]]
    for process in left:
        process.kill()
    assert not left


def ask(served, examples):
    answers = []
    Endpoint(served.endpoint, served.name, Tokens(), FAMILY, 64, key=served.key).ask(examples, answers.append)
    return answers


def adapter_of_rank(folder: Path, rank: int) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    return folder


def test_the_base_is_served_alone_or_with_the_adapter_beside_it(start, tmp_path):
    adapter = adapter_of_rank(tmp_path / "adapter", 24)
    for given, name, room in ((None, "original", None), (adapter, "finetuned", 32)):
        with start(given, device="3", max_concurrency=7, memory_share=0.5) as served:
            assert served.name == name
            answers = ask(served, EXAMPLES[:5])
        assert sorted(answer.example_id for answer in answers) == ["0", "1", "2", "3", "4"]
        told = json.loads(answers[0].text)
        arguments, environment = told["arguments"], told["environment"]
        assert (arguments["model"], arguments["dtype"], arguments["max_model_len"]) == (
            str(tmp_path / "base"), "float32", 300,
        )  # fmt: skip
        assert (arguments["host"], arguments["max_num_seqs"], arguments["gpu_memory_utilization"]) == (
            "127.0.0.1", 7, 0.5,
        )  # fmt: skip
        # A model's own settings may ask for a penalty on repetition.
        assert arguments["generation_config"] == "vllm"
        assert (arguments["lora_modules"], arguments["max_lora_rank"]) == (
            (f"finetuned={adapter}", room) if given else (None, None)
        )
        assert environment["CUDA_VISIBLE_DEVICES"] == "3"
        assert environment["HF_HUB_OFFLINE"] == environment["VLLM_NO_USAGE_STATS"] == "1"
        assert not environment.keys() & {"RANK", "LOCAL_RANK", "MASTER_ADDR", "PYTHONPATH"}
        # Everyone on the machine sees arguments.
        assert served.key not in json.dumps(arguments)
        assert served.key not in repr(Endpoint(served.endpoint, "m", Tokens(), FAMILY, 64, key=served.key))


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ("at the start", "(?s)ended with exit code 1.*no kernel image"),
        ("to serve", r"does not serve after inference.vllm.start_limit_minutes=0.05"),
        ("halfway", "(?s)ended with exit code 1.*illegal memory access"),
    ],
)
def test_a_server_that_fails_is_quoted_and_leaves_nothing_behind(start, fails, said):
    with pytest.raises(ServerProblem, match=said), start(fails=fails, start_limit_minutes=0.05) as served:
        ask(served, EXAMPLES)


def test_other_errors_stay_themselves_and_end_the_server(start):
    with pytest.raises(ZeroDivisionError), start():
        raise ZeroDivisionError


def test_a_rank_that_no_server_takes_and_a_python_that_is_none_are_refused(start, tmp_path):
    with (
        pytest.raises(ServerProblem, match="rank 1024 is above 512"),
        start(adapter_of_rank(tmp_path / "adapter", 1024)),
    ):
        pass
    settings = VllmSettings(python="/no/such/python")
    with (
        pytest.raises(ServerProblem, match="python=/no/such/python is no program"),
        serving(settings, tmp_path, None, precision="float32", max_tokens=9, device=None, log=tmp_path / "log"),
    ):
        pass


def test_the_engine_needs_its_settings_and_no_others():
    with pytest.raises(ValidationError, match="vllm needs vllm.python"):
        InferenceSettings(engine="vllm")
    with pytest.raises(ValidationError, match="engine=transformers with vllm=given"):
        InferenceSettings(vllm=VllmSettings(python="/opt/vllm/bin/python"))
    with pytest.raises(ValidationError, match="python"):
        VllmSettings(python="python")
