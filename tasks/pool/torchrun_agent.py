"""torchrun, whose failures are left as JSON: ``python -m tasks.pool.torchrun_agent FAILURES.json <torchrun options>``.

``{node}`` in the file's name is this node's rank among the job's, which the scheduler tells (``NODE_RANK``,
``SLURM_NODEID``), so that all nodes run one command.

torchrun knows which rank failed first and with which exception, and only prints it. Written down, the orchestrator can
show the rank's own error instead of the last line of somebody's log.
"""

import os
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from tasks.contracts.files import write_json


def main(argv: list[str]) -> int:
    node = os.environ.get("NODE_RANK") or os.environ.get("SLURM_NODEID") or "0"
    failures_file, options = Path(argv[1].replace("{node}", node)), argv[2:]
    try:
        torchrun(options)
    except ChildFailedError as error:
        failures = []
        for rank, failure in error.failures.items():
            data = failure.error_file_data.get("message", "")
            extra = data.get("extraInfo", {}) if isinstance(data, dict) else {}
            failures.append(
                {
                    "rank": rank,
                    "exit_code": failure.exitcode,
                    "message": failure.message,
                    "traceback": extra.get("py_callstack", ""),
                    "has_own_error": bool(extra),
                    "time": failure.timestamp,
                }
            )
        write_json(failures_file, failures)
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
