"""What a rank finds around itself in a pod: ``torchrun -m tests.kubernetes.confined_job spec.json``."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.contracts.attempt import Attempt, run_rank


def main(attempt: Attempt) -> Mapping[str, Any] | None:
    return {
        "user": os.getuid(),
        "has_token": Path("/var/run/secrets/kubernetes.io/serviceaccount/token").exists(),
        "may_write_root": os.access("/", os.W_OK),
        "odd": os.environ["ODD"],
        "shared_memory_bytes": os.statvfs("/dev/shm").f_frsize * os.statvfs("/dev/shm").f_blocks,
    }


if __name__ == "__main__":
    run_rank(main, sys.argv)
