"""Stage: LoRA fine-tuning on the GPU pool."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from tasks.pool.stage_jobs import training_job
from tasks.prepare_dataset import PreparedDataset
from tasks.run import Run
from tasks.stage import run_stage
from tasks.training.plan import plan_training

STAGE = "train_adapter"


@dataclass(frozen=True)
class TrainedAdapter:
    """A finished adapter, the job's figures and its run in MLflow."""

    path: str
    figures: dict[str, Any]
    mlflow_run_id: str


@task(name=STAGE, cache_policy=NO_CACHE)
def train_adapter(run: Run, dataset: PreparedDataset) -> TrainedAdapter:
    """Train the adapter; an attempt that follows a failed one goes on from its newest whole checkpoint."""
    experiment = run.experiment
    # With the real number of rows now known: refuse before any GPU is asked for.
    plan_training(experiment.training, num_rows=dataset.num_train_rows, world_size=experiment.pool.world_size)
    stage = run_stage(run, STAGE, training_job(experiment, run.folder, dataset=dataset.path))
    adapter = Path(stage.result["adapter"])
    child = stage.mlflow_run_id
    run.tracking.log_params(child, experiment.training.model_dump(mode="json"))
    run.tracking.log_dataset(
        child,
        name=experiment.dataset.title,
        digest=dataset.digest,
        source=dataset.path,
        num_rows=dataset.num_train_rows,
        context="training",
    )
    figures = dict(stage.result)
    names = ("final_loss", "tokens_per_s_per_gpu", "total_steps", "peak_memory_gbytes")
    run.tracking.log_metrics(child, {f"train/{name}_of_run": figures[name] for name in names})
    run.tracking.client.set_tag(child, "base_weights_sha256", figures["base_weights_sha256"])
    if figures["failed_checkpoints"]:
        lost = "\n".join(figures["failed_checkpoints"])
        get_run_logger().warning("some checkpoints could not be written, training went on without them:\n%s", lost)
        run.tracking.client.set_tag(child, "failed_checkpoints", lost[:5000])
    if "merged" in figures:
        # Where it is, not what it is: as large as the base, and on the shared storage already.
        run.tracking.client.set_tag(child, "merged_model", figures["merged"])
    run.tracking.log_folder(child, adapter, "adapter")
    return TrainedAdapter(str(adapter), figures, child)
