"""One's own question to both models of a finished run, side by side.

    python -m tasks.inference ask latest "What's the weather in Paris?" --tools tools.json
    python -m tasks.inference ask latest "..."            with the tools of the run's own test rows

The base is loaded once; its adapter is switched off for the original model and on for the fine-tuned one.
"""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.contracts.call_check import CallProblem, check_call, check_schema
from tasks.contracts.conversation import Example, Message, Tool, calls_to_json
from tasks.contracts.files import read_json
from tasks.contracts.overrides import SettingsError, read_experiment
from tasks.contracts.prediction import Prediction
from tasks.contracts.run_folder import RunFolder
from tasks.contracts.settings import Experiment, StorageSettings

MAX_OWN_TOOLS = 8
"""Of the test rows' tools, those of the rows that come first: more would make the question hard for other reasons."""


class NotAsked(ValueError):
    """The question cannot be put; says what to do."""


@dataclass(frozen=True)
class Question:
    """What is asked, of which run."""

    folder: RunFolder
    experiment: Experiment
    example: Example


def main(argv: Sequence[str]) -> int:
    arguments = _parse(argv)
    try:
        folder, experiment = find_run(arguments.run, arguments.storage)
        tools = read_tools(Path(arguments.tools)) if arguments.tools else own_tools(folder)
        example = Example("question", (Message("user", arguments.question),), tools, (), "", "asked", "test")
        answers = ask(Question(folder, experiment, example), arguments.max_new_tokens)
    except (NotAsked, SettingsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"offered: {', '.join(tool['name'] for tool in example.tools) or 'nothing'}\n")
    print(side_by_side(example, answers, shutil.get_terminal_size((100, 24)).columns))
    return 0


def find_run(name: str, storage: str) -> tuple[RunFolder, Experiment]:
    """The folder and settings of a finished run.

    Args:
        name: of the run, or ``latest``.

    Raises:
        NotAsked: there is no such run, or it has no adapter yet.
    """
    runs = Path(storage).resolve() / "runs"
    path = (runs / name).resolve()
    if not (path / "experiment.json").exists():
        known = sorted(p.parent.name for p in runs.glob("*/experiment.json") if not p.parent.is_symlink())
        raise NotAsked(
            f"no run {name!r} in {runs}; there are: {', '.join(known) or 'none'} (--storage names the folder)"
        )
    folder = RunFolder(StorageSettings(shared=str(runs.parent)), path.name)
    if not (folder.adapter / "manifest.json").exists():
        raise NotAsked(f"run {path.name} has no finished adapter in {folder.adapter}: its training has not ended")
    return folder, read_experiment(read_json(folder.experiment)["experiment"])


def read_tools(path: Path) -> tuple[Tool, ...]:
    """Tools as a JSON list, each ``{"name", "description", "parameters"}`` or OpenAI's ``{"type", "function": {...}}``.

    Raises:
        NotAsked: the file is not that, or a schema cannot be used.
    """
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise NotAsked(f"--tools {path}: {error}") from error
    tools = []
    for value in values if isinstance(values, list) else [values]:
        tool = value.get("function", value) if isinstance(value, dict) else value
        if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
            raise NotAsked(
                f"--tools {path}: a tool is an object with name, description, parameters; got {str(value)[:80]}"
            )
        tool = {"description": "", "parameters": {"type": "object", "properties": {}}, **tool}
        try:
            check_schema(tool["parameters"])
        except ValueError as error:
            raise NotAsked(f"--tools {path}: parameters of {tool['name']}: {error}") from error
        tools.append(tool)
    return tuple(tools)


def own_tools(folder: RunFolder) -> tuple[Tool, ...]:
    """Tools of the run's own test rows."""
    from tasks.dataset.stored import read_examples

    found: dict[str, Tool] = {}
    for example in read_examples(folder.dataset / "test.parquet"):
        for tool in example.tools:
            if len(found) < MAX_OWN_TOOLS:
                found.setdefault(tool["name"], tool)
    return tuple(found.values())


def ask(question: Question, max_new_tokens: int | None) -> list[tuple[str, Prediction]]:
    """Both models' answers, the original's first."""
    # Settings and files are checked before torch takes its seconds.
    from peft import PeftModel

    from tasks.dataset.rendering.family import detect_family, family_for
    from tasks.inference.adapted import check_base
    from tasks.inference.generate import generate
    from tasks.models.load import load_model, load_tokenizer, resolve_precision
    from tasks.models.materialise import materialise

    folder, experiment = question.folder, question.experiment
    base = materialise(experiment.model, Path(folder.storage.shared))
    try:
        check_base(folder.adapter, base)
    except ValueError as error:
        raise NotAsked(str(error)) from error
    tokenizer = load_tokenizer(base)
    family_name = experiment.model.family
    family = family_for(detect_family(base) if family_name == "auto" else family_name, tokenizer)
    model = load_model(base, resolve_precision(experiment.inference.precision))
    adapted: Any = PeftModel.from_pretrained(model, folder.adapter, autocast_adapter_dtype=False).eval()
    asked = experiment.inference
    limit = max_new_tokens or asked.max_new_tokens
    answers = []
    for who, switch in (("original model", adapted.disable_adapter()), ("fine-tuned model", nullcontext())):
        with switch:
            (prediction,) = generate(
                adapted, tokenizer, family, [question.example], batch_size=1, max_new_tokens=limit,
                temperature=asked.temperature, seed=asked.seed,
            )  # fmt: skip
        answers.append((who, prediction))
    return answers


def side_by_side(example: Example, answers: Sequence[tuple[str, Prediction]], width: int) -> str:
    """The answers in columns where the terminal is wide enough, else one below the other."""
    columns = [_column(example, who, prediction) for who, prediction in answers]
    each = (width - 3) // 2
    if each < 36:
        return "\n\n".join("\n".join(line for text in column for line in _wrap(text, width)) for column in columns)
    left, right = ([line for text in column for line in _wrap(text, each)] for column in columns)
    height = max(len(left), len(right))
    left, right = (lines + [""] * (height - len(lines)) for lines in (left, right))
    return "\n".join(f"{a:<{each}} | {b}".rstrip() for a, b in zip(left, right, strict=True))


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, drop_whitespace=False, break_on_hyphens=False) or [""]


def _column(example: Example, who: str, prediction: Prediction) -> list[str]:
    """What one model answered, as lines of any length."""
    lines = [who.upper(), *prediction.text.splitlines(), ""]
    if prediction.strict.error:
        lines.append(f"cannot be read: {prediction.strict.error}")
    elif not prediction.strict.calls:
        lines.append("no call")
    for call in prediction.strict.calls:
        try:
            check_call(call, example.tools)
            verdict = "fits its schema"
        except CallProblem as problem:
            verdict = f"does not fit: {problem}"
        lines.append(f"{calls_to_json([call])[1:-1]}: {verdict}")
    cut = ", cut at the longest answer allowed" if prediction.was_cut else ""
    return [*lines, f"{prediction.num_new_tokens} tokens in {prediction.latency_s:.1f} s{cut}"]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.inference ask", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="name of a finished run, or latest")
    parser.add_argument("question")
    parser.add_argument("--tools", metavar="FILE", help="JSON list of tools (default: some of the run's own test rows)")
    parser.add_argument("--storage", default="storage", help="the run's storage.shared (default: storage)")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer (default: the run's own)")
    return parser.parse_args(argv)
