"""A vLLM server of this rank's own, on its own GPU: started, waited for, asked over localhost, ended.

vLLM pins another torch than ours, so it lives in an environment of its own and is a process. It serves the base under the name
``original`` and, where there is one, the adapter beside it under ``finetuned``. It is asked through
:class:`~tasks.inference.endpoint.Endpoint` with our token ids. What it prints stands in ``vllm-<rank>.log`` in the attempt's
folder.
"""

import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import torch

from tasks.contracts.files import read_json
from tasks.contracts.settings import EndpointSettings, VllmSettings
from tasks.hardware.host import LOOPBACK, end_with_parent, free_port

ORIGINAL, FINETUNED = "original", "finetuned"
RANKS = (8, 16, 32, 64, 128, 256, 512)
"""Of adapters, for which vLLM has room: it takes these only, as the largest (``vllm/config/lora.py``)."""
TAIL_LINES = 25
END_LIMIT_S = 30.0
OF_TORCHRUN = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC_",
    "TORCH_NCCL_",
    "PYTHONPATH",
)
"""Beginnings of variables that would make vLLM take itself for one of our ranks, or import our packages."""


class ServerProblem(RuntimeError):
    """vLLM cannot be started, or ended before it served."""


@dataclass(frozen=True)
class Serving:
    """A server that answers: where, under which name, with which key (None: that of the environment)."""

    endpoint: EndpointSettings
    name: str
    key: str | None


@contextmanager
def serving(
    settings: VllmSettings,
    base: Path,
    adapter: Path | None,
    *,
    precision: str,
    max_tokens: int,
    device: str | None,
    log: Path,
) -> Iterator[Serving]:
    """A server for the time of the block.

    Args:
        base: folder of the original model.
        adapter: folder of a LoRA adapter as PEFT writes it; None: the base alone.
        max_tokens: longest prompt and answer together.
        device: the GPU, as CUDA_VISIBLE_DEVICES names it; None: no GPU.
        log: file for all that the server prints.

    Raises:
        ServerProblem: with the log's last lines.
    """
    if not os.access(settings.python, os.X_OK):
        raise ServerProblem(
            f"inference.vllm.python={settings.python} is no program on {socket.gethostname()}: make an environment there with "
            "`python3 -m venv` and `pip install vllm`, on every node under the same path"
        )
    key, port = secrets.token_hex(16), free_port()
    command = [
        settings.python, "-m", "vllm.entrypoints.openai.api_server",
        *("--model", str(base), "--served-model-name", ORIGINAL, "--dtype", precision),
        *("--host", LOOPBACK, "--port", str(port), "--max-model-len", str(max_tokens)),
        *("--max-num-seqs", str(settings.max_concurrency), "--gpu-memory-utilization", str(settings.memory_share)),
        # Not the model's own: Qwen's asks for a repetition penalty, which would no longer be greedy.
        *("--generation-config", "vllm"),
    ]  # fmt: skip
    if adapter is not None:
        command += ["--enable-lora", "--lora-modules", f"{FINETUNED}={adapter}", "--max-lora-rank", str(_room(adapter))]
    with log.open("wb") as file:
        server = subprocess.Popen(
            command,
            env=_environment(os.environ, device) | {"VLLM_API_KEY": key},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=end_with_parent,
        )
    family: list[psutil.Process] = []
    try:
        address = f"http://{LOOPBACK}:{port}"
        _wait(server, address, settings, log)
        # Its engine is a process of its own, which outlives a server that was killed.
        family = psutil.Process(server.pid).children(recursive=True)
        endpoint = EndpointSettings(
            url=f"{address}/v1",
            original=ORIGINAL,
            finetuned=FINETUNED,
            max_concurrency=settings.max_concurrency,
            # A server that is well answers all of a full batch within this; one that died refuses at once.
            timeout_s=600,
            max_retries=1,
        )
        try:
            yield Serving(endpoint, ORIGINAL if adapter is None else FINETUNED, key)
        except Exception as error:
            if server.poll() is not None:
                raise ServerProblem(_ended(server, log)) from error
            raise
    finally:
        _end(server, family)


def gpu_of_this_rank() -> str | None:
    """As CUDA_VISIBLE_DEVICES names it; None where torch sees none."""
    if not torch.cuda.is_available():
        return None
    place = int(os.environ["LOCAL_RANK"])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[place] if visible else str(place)


def _room(adapter: Path) -> int:
    rank = int(read_json(adapter / "adapter_config.json")["r"])
    for room in RANKS:
        if rank <= room:
            return room
    raise ServerProblem(
        f"the adapter's rank {rank} is above {RANKS[-1]}, the largest vLLM serves; use engine=transformers"
    )


def _environment(ours: Mapping[str, str], device: str | None) -> dict[str, str]:
    kept = {name: value for name, value in ours.items() if not name.startswith(OF_TORCHRUN)}
    # Its answers leave the machine as little as ours do.
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    return kept | quiet | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})


def _wait(server: subprocess.Popen[bytes], address: str, settings: VllmSettings, log: Path) -> None:
    deadline = time.monotonic() + settings.start_limit_minutes * 60
    while True:
        if server.poll() is not None:
            raise ServerProblem(_ended(server, log))
        try:
            if httpx.get(f"{address}/health", timeout=5).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        if time.monotonic() > deadline:
            raise ServerProblem(
                f"vLLM does not serve after inference.vllm.start_limit_minutes={settings.start_limit_minutes:g}:\n{_tail(log)}"
            )
        time.sleep(0.5)


def _ended(server: subprocess.Popen[bytes], log: Path) -> str:
    return f"vLLM ended with exit code {server.returncode}; the end of {log}:\n{_tail(log)}"


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])


def _end(server: subprocess.Popen[bytes], family: Sequence[psutil.Process]) -> None:
    """The server, and what it started that is still there afterwards."""
    if server.poll() is None:
        family = [*family, *psutil.Process(server.pid).children(recursive=True)]
    server.terminate()
    try:
        server.wait(END_LIMIT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
