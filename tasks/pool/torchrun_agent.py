"""torchrun, whose failures are left as JSON: ``python -m tasks.pool.torchrun_agent FAILURES.json <torchrun options>``.

``{node}`` in the file's name is this node's rank among the job's, which the scheduler tells (``NODE_RANK``,
``SLURM_NODEID``), so that all nodes run one command.

torchrun knows which rank failed first and with which exception, and only prints it. Written down, the orchestrator can
show the rank's own error instead of the last line of somebody's log.

A request to leave (SIGTERM at preemption, SIGUSR1 ahead of a time limit) goes on to the ranks, which save and leave;
torchrun itself would forget SIGUSR1 and die, and at SIGTERM leave without a word of what its ranks did. Exit status: 0, 1
failed, 75 left on request, to be gone on with.
"""

import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from tasks.contracts.files import write_json
from tasks.contracts.job import LEFT_EXIT_CODE
from tasks.pool.torchrun_files import HOST

REQUESTS_TO_LEAVE = signal.SIGTERM, signal.SIGUSR1
GRACE_S = 2.0
"""After a request that finds no ranks: they may have ended just now, and how is about to be written."""

_requested: set[int] = set()


def main(argv: list[str]) -> int:
    node = os.environ.get("NODE_RANK") or os.environ.get("SLURM_NODEID") or "0"
    failures_file, options = Path(argv[1].replace("{node}", node)), argv[2:]
    if scratch := os.environ.get("TMPDIR"):
        # Each node's own: nobody else can make it, and where it is missing Python silently takes another folder.
        Path(scratch).mkdir(parents=True, exist_ok=True)
    # A pod has a name of its own and is told its node's.
    write_json(
        failures_file.with_name(HOST.format(node=node)),
        {"host": os.environ.get("NODE_NAME") or socket.gethostname(), "pid": os.getpid()},
    )
    # torchrun takes over the signals named here (its option --signals-to-handle) and leaves the rest to us.
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"
    for number in REQUESTS_TO_LEAVE:
        signal.signal(number, _pass_on)
    signal.signal(signal.SIGALRM, _leave)
    try:
        torchrun(options)
    except ChildFailedError as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        write_json(failures_file, [_failure(rank, failure) for rank, failure in error.failures.items()])
        codes = {failure.exitcode for failure in error.failures.values()}
        on_request = {LEFT_EXIT_CODE, *(-number for number in _requested)}
        if codes <= on_request:
            print("the ranks left on request")
            return LEFT_EXIT_CODE
        print(error, file=sys.stderr)
        return 1
    return 0


def _pass_on(number: int, frame: Any) -> None:
    if not _reaches_ranks(number):
        signal.setitimer(signal.ITIMER_REAL, GRACE_S)


def _leave(number: int, frame: Any) -> None:
    # They may have begun since. If not, the other nodes are waited for, before the ranks or after: there is nothing to save.
    if not _reaches_ranks(signal.SIGTERM):
        raise SystemExit(LEFT_EXIT_CODE)


def _reaches_ranks(number: int) -> bool:
    ranks = psutil.Process().children()
    if ranks:
        _requested.add(number)
    for rank in ranks:
        rank.send_signal(number)
    return bool(ranks)


def _failure(rank: int, failure: Any) -> dict[str, Any]:
    data = failure.error_file_data.get("message", "")
    extra = data.get("extraInfo", {}) if isinstance(data, dict) else {}
    return {
        "rank": rank,
        "exit_code": failure.exitcode,
        "message": failure.message,
        "traceback": extra.get("py_callstack", ""),
        "has_own_error": bool(extra),
        "time": failure.timestamp,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv))
