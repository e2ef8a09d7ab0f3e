"""The house's rules: who may import whom, and what must stay light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
STAGES = {"dataset", "inference", "training", "evaluation", "report", "pool", "cluster"}
SERVE_ALL = {"contracts", "models", "hardware", "pages", "tracking"}
SHARED_RENDERING = "tasks.dataset"
"""Training, inference and evaluation share the dataset's rendering and files."""
SHARED_STATISTICS = {("report", "tasks.evaluation.statistics")}
"""A page over several runs makes the same claims as one over a single run, by the same tests."""


def modules() -> list[Path]:
    return sorted([*REPOSITORY.glob("flows/**/*.py"), *REPOSITORY.glob("tasks/**/*.py")])


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in ("flows", "tasks")}


def problems_of(path: Path) -> list[str]:
    parts = path.relative_to(REPOSITORY).parts
    problems = []
    for name in ours(imports_of(path)):
        target = name.split(".")
        is_flow = parts[0] == "flows"
        is_task_file = parts[0] == "tasks" and len(parts) == 2
        folder = parts[1] if parts[0] == "tasks" and len(parts) > 2 else None
        if target[0] == "flows" and not is_flow:
            problems.append(f"{path} imports {name}: only flows import flows")
        if folder:
            if len(target) == 2 and (REPOSITORY / "tasks" / f"{target[1]}.py").exists():
                problems.append(f"{path} imports {name}: a stage folder knows nothing of Prefect tasks")
            if folder == "contracts" and target[1] != "contracts":
                problems.append(f"{path} imports {name}: contracts import nothing else of ours")
            elif target[1] in STAGES - {folder}:
                shares = (folder, name) in SHARED_STATISTICS or (
                    folder in {"training", "inference", "evaluation"} and name.startswith(SHARED_RENDERING)
                )
                if not shares:
                    problems.append(f"{path} imports {name}: stage folders do not import each other")
            if folder in SERVE_ALL - {"contracts"} and target[1] in STAGES:
                problems.append(f"{path} imports {name}: what serves all stages depends on none")
        if is_task_file and target[0] == "flows":
            problems.append(f"{path} imports {name}")
    return problems


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_imports_go_one_way(path):
    assert problems_of(path) == []


def test_the_rule_catches_a_stage_that_imports_another(tmp_path, monkeypatch):
    bad = REPOSITORY / "tasks" / "report" / "bad_example.py"
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: "from tasks.training.plan import plan_training")
    assert problems_of(bad) != []


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_flows_and_tasks_import_without_torch():
    assert not loaded_by("import flows.finetune, flows.cluster_check") & {"torch", "transformers", "trl", "datasets"}


@pytest.mark.parametrize("program", ["tasks.training", "tasks.inference"])
def test_a_program_is_imported_within_its_ranks_record(program):
    """Without a spec there is no record yet."""
    command = [sys.executable, "-X", "importtime", "-m", program]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert "usage: python -m" in done.stderr
    assert not re.search(r"\| +(torch|transformers)$", done.stderr, re.M)


def test_ranks_import_neither_prefect_nor_mlflow_nor_what_draws():
    """Each rank of each job pays for what it imports: pictures are a second of ten."""
    statement = "import tasks.training.train, tasks.inference.run, tasks.dataset.__main__, tasks.cluster.__main__"
    statement += ", tasks.cluster.collectives, tasks.cluster.devices, tasks.cluster.endurance, tasks.cluster.inventory"
    assert not loaded_by(statement) & {"prefect", "mlflow", "matplotlib"}


def test_no_file_is_a_drawer():
    drawers = {"utils", "common", "helpers", "manager", "misc"}
    assert [path for path in modules() if path.stem in drawers] == []
