"""The digest under which a prepared dataset is kept: everything that could change a byte of it, known without work."""

import importlib.metadata
from pathlib import Path

from tasks.contracts.files import digest_of, digest_of_files
from tasks.contracts.settings import DatasetSettings
from tasks.dataset.sources.read import is_file_name

LIBRARIES = ("transformers", "tokenizers", "pyarrow", "datasets")


def dataset_digest(settings: DatasetSettings, model_identity: str | None, family: str) -> str | None:
    """SHA-256 of settings, source, model, this stage's code and its libraries; None if the source can change unseen."""
    source = settings.name
    if settings.name != "embedded":
        if is_file_name(settings.name):
            path = Path(settings.name).expanduser().resolve()
            source = digest_of_files([path], path.parent)
        elif settings.revision is None:
            return None
    if model_identity is None:
        return None
    folder = Path(__file__).parent
    code = [path for path in folder.rglob("*") if path.suffix in (".py", ".yaml")]
    return digest_of(
        {
            "settings": settings.model_dump(mode="json") | {"name": source},
            "model": model_identity,
            "family": family,
            "code": digest_of_files(code, folder),
            "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        }
    )
