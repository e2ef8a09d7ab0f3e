"""What runs first in every pod of a job: ``python -m tasks.pool.kubernetes_pod ATTEMPT_FOLDER HOST:PORT AGENT...``.

Waits until pod 0 can be found, runs torchrun's agent, and writes its output both to the node's log on shared storage, which
the flow follows, and to the pod's own. ``node-N.exit.json`` comes last: how the node ended can be read when the Job is gone.
"""

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

from tasks.contracts.attempt import BEGUN
from tasks.contracts.files import write_json
from tasks.contracts.job import LEFT_EXIT_CODE
from tasks.pool.torchrun_files import FAILURES, HOST

EXIT = "node-{node}.exit.json"
POLL_S = 0.5
DRAIN_S = 2.0
"""Ranks that outlive their agent keep its output open: nobody waits for them longer."""
SAY_S = 60.0
PASSED_ON = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


class Leave(Exception):
    """Asked to leave before there was anything to end."""


def main(argv: list[str]) -> int:
    attempt, (host, _, port), command = Path(argv[1]), argv[2].rpartition(":"), argv[3:]
    node = int(os.environ["JOB_COMPLETION_INDEX"])
    # A Job that Kueue suspended and resumed runs this again: what its former life left must not be taken for this one's.
    for name in (EXIT, FAILURES, HOST, *([BEGUN] if node == 0 else [])):
        (attempt / name.format(node=node)).unlink(missing_ok=True)
    try:
        for number in PASSED_ON:
            signal.signal(number, _leave)
        Path(os.environ.get("TMPDIR", "/tmp")).mkdir(parents=True, exist_ok=True)  # noqa: S108
        with (attempt / f"node-{node}.log").open("ab", buffering=0) as log:
            try:
                _wait_for_pod_0(host, int(port), node, log)
                code = _run(command, node, log)
            except OSError as error:
                _tell(log, f"cannot start: {error}")
                code = 1
    except Leave:
        code = LEFT_EXIT_CODE
    write_json(attempt / EXIT.format(node=node), {"exit_code": code, "host": os.environ.get("NODE_NAME", "")})
    return code


def exit_codes(attempt: Path, num_nodes: int) -> list[int | None]:
    """How every node's agent ended: its exit status, or None where nothing was written."""
    paths = [attempt / EXIT.format(node=node) for node in range(num_nodes)]
    return [json.loads(path.read_text())["exit_code"] if path.exists() else None for path in paths]


def _leave(number: int, frame: Any) -> None:
    # Once: how it ended is about to be written.
    for each in PASSED_ON:
        signal.signal(each, signal.SIG_IGN)
    raise Leave


def _wait_for_pod_0(host: str, port: int, node: int, log: BinaryIO) -> None:
    """Until its name is known, and on other nodes until its agent listens; the pod's deadline is the limit.

    torchrun would give up after a minute, and pods start minutes apart where one of the nodes lacks the image.
    """
    told = time.monotonic()
    while True:
        try:
            if node == 0:
                socket.getaddrinfo(host, port)
            else:
                socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() - told >= SAY_S:
                told = time.monotonic()
                _tell(log, f"node {node} waits for node 0 at {host}:{port}: {error}")
        time.sleep(POLL_S)


def _run(command: list[str], node: int, log: BinaryIO) -> int:
    # Told and not guessed: torchrun would compare host names to find out who keeps the store.
    config = f"{os.environ.get('PET_RDZV_CONF', '')},is_host={'true' if node == 0 else 'false'}".lstrip(",")
    agent = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"NODE_RANK": str(node), "PET_RDZV_CONF": config},
    )
    assert agent.stdout is not None
    for number in PASSED_ON:
        signal.signal(number, lambda number, frame: agent.send_signal(number))
    _copy(agent, agent.stdout.fileno(), log)
    code = agent.wait()
    return code if code >= 0 else 128 - code


def _copy(agent: subprocess.Popen[bytes], output: int, log: BinaryIO) -> None:
    """The agent's output to both logs, until it ends."""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        ended: float | None = None
        while ended is None or time.monotonic() - ended < DRAIN_S:
            if selector.select(POLL_S):
                data = os.read(output, 1 << 16)
                if not data:
                    return
                _write(log, data)
            if ended is None and agent.poll() is not None:
                ended = time.monotonic()


def _tell(log: BinaryIO, text: str) -> None:
    _write(log, f"{text}\n".encode())


def _write(log: BinaryIO, data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
    try:
        log.write(data)
    except OSError as error:
        # A full disk ends the ranks when they save, with an error of their own; here it must not end what still runs.
        print(f"the node's log cannot be written: {error}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
