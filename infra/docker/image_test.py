"""What an image must be, asked inside it: ``docker run --rm IMAGE python infra/docker/image_test.py flows`` (or another kind).

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
"""Of all of the flows' image, its base included."""
NEEDED = {
    "flows": [
        "flows.finetune",
        "flows.cluster_check",
        "flows.reconcile",
        "deployments.deploy",
        "deployments.start_checked",
        "infra.monitoring.textfile",
    ],
    "servers": ["mlflow.server.auth", "psycopg2", "flask_wtf", "deployments.deploy", "deployments.start_checked"],
    "train": ["tasks.training", "flows.finetune"],
}
"""What each image must be able to import."""
OF_THE_KERNEL = ("proc", "sys", "dev")


def size_mb(root: Path) -> float:
    """Of all files below ``root``, a file with several names once; what the kernel shows as files is none."""
    sizes = {}
    for top in root.iterdir():
        if top.name in OF_THE_KERNEL or top.is_symlink():
            continue
        for folder, _, names in os.walk(top) if top.is_dir() else [(root, [], [top.name])]:
            for name in names:
                told = Path(folder, name).lstat()
                sizes[told.st_dev, told.st_ino] = told.st_size
    return sum(sizes.values()) / 1e6


def problems(kind: str) -> Iterator[str]:
    """Everything that is wrong with this image as one of that kind."""
    if os.getuid() == 0:
        yield "runs as root"
    if os.access("/app/tasks", os.W_OK):
        yield "its own code can be written by its user"
    has_torch = importlib.util.find_spec("torch") is not None
    if kind != "train" and has_torch:
        yield "has torch"
    if kind == "flows":
        packages, whole = size_mb(Path(sys.prefix)), size_mb(Path("/"))
        print(f"{whole:.0f} MB, of them packages in {sys.prefix} {packages:.0f} MB")
        if whole > SIZE_LIMIT_MB:
            yield f"it is {whole:.0f} MB and may be {SIZE_LIMIT_MB}"
    if kind == "train":
        if not has_torch:
            yield "has no torch"
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            yield f"has no {sysconfig.get_path('include')}/Python.h, without which Triton compiles no kernel"
    for module in NEEDED[kind]:
        try:
            importlib.import_module(module)
        except ImportError as error:
            yield f"{module} does not import: {error}"


if __name__ == "__main__":
    found = list(problems(sys.argv[1]))
    print("\n".join(found) or "ok")
    sys.exit(bool(found))
