"""Dataset preparation as a job of the pool: ``torchrun -m tasks.dataset spec.json``.

The spec's arguments: ``model``, ``dataset`` (settings), ``storage`` (shared folder), ``output`` (folder to make).
"""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.contracts.attempt import Attempt, run_rank
from tasks.contracts.files import publish_folder
from tasks.contracts.settings import DatasetSettings, ModelSettings
from tasks.dataset.prepare import prepare
from tasks.dataset.rendering.family import FAMILIES, detect_family
from tasks.models.load import load_tokenizer
from tasks.models.materialise import materialise


def main(attempt: Attempt) -> Mapping[str, Any]:
    arguments = attempt.arguments
    model = ModelSettings(**arguments["model"])
    dataset = DatasetSettings(**arguments["dataset"])
    output = Path(arguments["output"])
    print(f"model {model.name}: making it a local folder of safetensors where it is not one yet")
    folder = materialise(model, Path(arguments["storage"]))
    family = detect_family(folder) if model.family == "auto" else model.family
    print(f"model {model.name}: {folder}, conversations in the format of {family}")
    temporary = output.with_name(f".{output.name}.{attempt.folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    manifest = prepare(dataset, FAMILIES[family], load_tokenizer(folder), temporary)
    print((temporary / "quality.md").read_text())
    attempt.check_newest()
    output.parent.mkdir(parents=True, exist_ok=True)
    publish_folder(temporary, output)
    return manifest


if __name__ == "__main__":
    run_rank(main, sys.argv)
