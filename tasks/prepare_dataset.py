"""Stage: source rows to the files that training and inference read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.states import Completed

from tasks.contracts.files import digest_of_files, read_json
from tasks.dataset.identity import dataset_digest
from tasks.models.identity import identity
from tasks.pool.stage_jobs import dataset_job
from tasks.run import Run
from tasks.stage import child_run, keep, run_stage

STAGE = "prepare_dataset"
OUTCOMES = "What became of every row that was read"


@dataclass(frozen=True)
class PreparedDataset:
    """A dataset ready to teach and test with."""

    path: str
    digest: str
    num_train_rows: int
    num_test_rows: int
    reused: bool


@task(name=STAGE, cache_policy=NO_CACHE)
def prepare_dataset(run: Run) -> Any:
    """Prepare the dataset, or reuse it if the same settings, source, model and code have made it before."""
    settings, model = run.experiment.dataset, run.experiment.model
    digest = dataset_digest(settings, identity(model), model.family)
    path, exists = keep(run, run.folder.dataset, "dataset", digest)
    if exists:
        get_run_logger().info("prepare_dataset: reusing %s, made from the same inputs before", path)
        with child_run(run, STAGE, {"reused": "true"}) as child:
            dataset = _record(run, path, child, reused=True)
        return Completed(name="Cached", message=f"reused {path}", data=dataset)
    stage = run_stage(run, STAGE, dataset_job(run.experiment, run.folder, output=str(path)))
    return _record(run, path, stage.mlflow_run_id, reused=False)


def _record(run: Run, path: Path, child: str, *, reused: bool) -> PreparedDataset:
    manifest = read_json(path / "manifest.json")
    # What the rows are, not what made them: the same rows have the same digest on any machine.
    digest = digest_of_files([path / "train.parquet", path / "test.parquet"], path)
    dataset = PreparedDataset(
        str(path), digest, manifest["num_train_rows"], manifest["num_test_rows"], reused
    )  # fmt: skip
    quality = (path / "quality.md").read_text()
    for run_id in (child, run.mlflow_run_id):
        run.tracking.log_dataset(
            run_id,
            name=run.experiment.dataset.title,
            digest=digest,
            source=str(path),
            num_rows=dataset.num_train_rows,
            context="training",
        )
    names = ("quality.md", "quality.json", "lengths.svg", "rejected.jsonl", "left_out.jsonl")
    run.tracking.log_files(child, [path / name for name in names])
    run.tracking.log_metrics(
        child, {"data/train_rows": dataset.num_train_rows, "data/test_rows": dataset.num_test_rows}
    )
    create_markdown_artifact(quality, key="dataset", description="Dataset quality")
    create_table_artifact(_outcomes(read_json(path / "quality.json")["rows"]), key="dataset-rows", description=OUTCOMES)
    return dataset


def _outcomes(rows: dict[str, Any]) -> list[dict[str, Any]]:
    table = [{"outcome": name, "reason": "", "rows": rows[name]} for name in ("train", "test", "unseen_tools")]
    for outcome in ("rejected", "left_out"):
        table += [{"outcome": outcome, "reason": reason, "rows": count} for reason, count in rows[outcome].items()]
    return table
