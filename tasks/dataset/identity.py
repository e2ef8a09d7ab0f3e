"""The digest under which a prepared dataset is kept: everything that could change a byte of it, known without work."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import fsspec

from tasks.contracts.files import digest_of, digest_of_files
from tasks.contracts.settings import DatasetSettings, SourceSettings
from tasks.dataset.benchmarks import find_benchmark
from tasks.dataset.sources.files import find_files, is_file_name

LIBRARIES = ("transformers", "tokenizers", "pyarrow", "datasets", "jsonschema", "numpy")
CONTRACTS = ("by_identity.py", "call_check.py", "conversation.py", "settings.py")
WITHOUT_EFFECT = {"num_workers"}
"""Settings that change how fast the dataset is made, and nothing in it."""


def dataset_digest(settings: DatasetSettings, model_identity: str | None, family: str) -> str | None:
    """SHA-256 of settings, sources, model, this stage's code and its libraries; None if a source can change unseen."""
    sources = [_identity(source) for source in settings.sources]
    if model_identity is None or None in sources:
        return None
    folder = Path(__file__).parent
    code = [path for path in folder.rglob("*") if path.suffix in (".py", ".yaml")]
    code += [folder.parent / "contracts" / name for name in CONTRACTS]
    benchmarks = [path for name in settings.benchmarks for path in find_benchmark(name)]
    return digest_of(
        {
            "settings": settings.model_dump(mode="json", exclude=WITHOUT_EFFECT | {"sources", "benchmarks"}),
            "sources": sources,
            "benchmarks": digest_of_files(benchmarks, Path(os.path.commonpath(benchmarks))) if benchmarks else None,
            "model": model_identity,
            "family": family,
            "code": digest_of_files(code, folder.parent),
            "python": platform.python_version(),
            "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        }
    )


def _identity(source: SourceSettings) -> object:
    """What the source's rows are: settings and content; None where that can change unseen."""
    settings = source.model_dump(mode="json", exclude={"name"})
    if source.name == "embedded":
        return [settings, source.name]
    if not is_file_name(source.name):
        return [settings, source.name] if re.fullmatch(r"[0-9a-f]{40}", source.revision or "") else None
    urls = find_files(source.name)
    if "://" in source.name and not source.name.startswith("file://"):
        return None
    paths = [Path(fsspec.core.url_to_fs(url)[1]) for url in urls]
    # Row ids, and so the order of the rows, carry the files' names.
    return [settings, digest_of_files(paths, paths[0].parent if len(paths) == 1 else Path(os.path.commonpath(paths)))]
