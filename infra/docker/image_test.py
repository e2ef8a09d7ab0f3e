"""What an image must be, asked inside it: ``docker run --rm IMAGE python infra/docker/image_test.py flows`` (or ``train``).

Exit status 1 and a line for each thing that is not so.
"""

import importlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SIZE_LIMIT_MB = 600
"""Of the flows' packages, without the base image."""


def problems(kind: str) -> Iterator[str]:
    """Everything that is wrong with this image as one of that kind."""
    if os.getuid() == 0:
        yield "runs as root"
    if os.access("/app/tasks", os.W_OK):
        yield "its own code can be written by its user"
    has_torch = importlib.util.find_spec("torch") is not None
    if kind == "flows":
        if has_torch:
            yield "has torch"
        size_mb = sum(file.stat().st_size for file in Path(sys.prefix).rglob("*") if file.is_file()) / 1e6
        print(f"{sys.prefix}: {size_mb:.0f} MB")
        if size_mb > SIZE_LIMIT_MB:
            yield f"its packages are {size_mb:.0f} MB and may be {SIZE_LIMIT_MB}"
    else:
        if not has_torch:
            yield "has no torch"
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            yield f"has no {sysconfig.get_path('include')}/Python.h, without which Triton compiles no kernel"
    needed = {
        "flows": [
            "flows.finetune",
            "flows.reconcile",
            "deployments.deploy",
            "deployments.start_checked",
            "infra.monitoring.textfile",
        ],
        "train": ["tasks.training", "flows.finetune"],
    }
    for module in needed[kind]:
        try:
            importlib.import_module(module)
        except ImportError as error:
            yield f"{module} does not import: {error}"


if __name__ == "__main__":
    found = list(problems(sys.argv[1]))
    print("\n".join(found) or "ok")
    sys.exit(bool(found))
