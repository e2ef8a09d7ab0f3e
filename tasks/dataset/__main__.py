"""Dataset preparation as a job of the pool, and the same for a look at a file.

torchrun -m tasks.dataset spec.json          the job; its arguments: model, dataset (settings), storage (shared folder),
output (folder to make)
python -m tasks.dataset inspect rows.jsonl   what would be kept of a file, and why the rest would not; --help tells more
"""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.contracts.attempt import Attempt, run_rank


def main(attempt: Attempt) -> Mapping[str, Any]:
    # Here, since workers import this module as well and need none of it.
    from tasks.contracts.files import publish_folder
    from tasks.contracts.settings import DatasetSettings, ModelSettings
    from tasks.dataset.prepare import prepare
    from tasks.dataset.rendering.family import detect_family, family_for
    from tasks.models.load import load_tokenizer
    from tasks.models.materialise import materialise

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
    temporary.mkdir(parents=True)
    tokenizer: Any = load_tokenizer(folder)
    # As this process has it, whatever the model's folder holds: transformers can make one of older files.
    tokenizer_file = temporary / "tokenizer.json"
    tokenizer.backend_tokenizer.save(str(tokenizer_file))
    manifest = prepare(
        dataset,
        family_for(family, tokenizer),
        tokenizer_file,
        temporary,
        on_progress=lambda num_rows: print(f"{num_rows} rows read"),
    )
    print((temporary / "quality.md").read_text())
    attempt.check_newest()
    publish_folder(temporary, output)
    return manifest


if __name__ == "__main__":
    if sys.argv[1:2] == ["inspect"]:
        from tasks.dataset.inspect import inspect

        sys.exit(inspect(sys.argv[2:]))
    run_rank(main, sys.argv)
