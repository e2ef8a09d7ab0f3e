"""Secrets in the environment of a run that must not turn up in anything it leaves, and what its processes were started with."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.processes import processes_under

PLANTED = {
    "HF_TOKEN": "hf_PlantedHubTokenPlantedHubToken",
    "MLFLOW_TRACKING_USERNAME": "admin",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-password",
}
SECRETS = [PLANTED["HF_TOKEN"], PLANTED["MLFLOW_TRACKING_PASSWORD"]]
ARGUMENTS: set[str] = set()
"""Command lines of every process that was seen while the first run lasted."""


@contextmanager
def sampled_arguments(storage: Path) -> Iterator[None]:
    """Look at the storage's processes four times a second, as any user of the machine may."""
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.25):
            for process in processes_under(storage):
                try:
                    ARGUMENTS.add(" ".join(process.cmdline()))
                except psutil.Error:
                    continue

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def files_with(folder: Path, secret: str) -> list[Path]:
    """Every file that holds the secret, as it is, in base64 or in hexadecimal; weights and datasets are read as well."""
    import base64

    raw = secret.encode()
    forms = {raw, raw.hex().encode(), *(base64.b64encode(b"x" * shift + raw)[4:-4] for shift in range(3))}
    found = []
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.is_symlink() and any(form in file.read_bytes() for form in forms):
            found.append(file)
    return found
