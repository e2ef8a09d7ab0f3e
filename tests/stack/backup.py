"""``infra/databases/backup.sh`` and ``restore.sh`` on the stack, as an operator runs them."""

import os
import subprocess
from pathlib import Path

from tests.conftest import REPOSITORY
from tests.stack.processes import Stack, postgres_binaries


def dump(stack: Stack, folder: Path) -> None:
    _run(stack, "backup.sh", folder)


def restore(stack: Stack, folder: Path) -> None:
    _run(stack, "restore.sh", folder)


def _run(stack: Stack, script: str, folder: Path) -> None:
    path = f"{postgres_binaries()}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | stack.client_environment() | {"PATH": path}
    subprocess.run([REPOSITORY / "infra" / "databases" / script, folder], env=environment, check=True)
