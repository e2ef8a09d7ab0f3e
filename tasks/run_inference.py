"""Stage: the test requests to one model; used for the original model, the fine-tuned one, and the champion where it is asked."""

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.states import Completed

from tasks.contracts.files import digest_of, digest_of_files, read_json
from tasks.models.identity import identity
from tasks.pool.stage_jobs import inference_job
from tasks.prepare_dataset import PreparedDataset
from tasks.run import Run
from tasks.stage import child_run, keep, run_stage

Which = Literal["baseline", "finetuned", "champion"]
LIBRARIES = ("torch", "transformers", "tokenizers")
ASKED_BY = (
    "inference/plain_conversations.jsonl",
    "dataset/bfcl.py",
    "dataset/sources/literals.py",
    "contracts/call_check.py",
    "contracts/conversation.py",
    "contracts/prediction.py",
)
"""What else, besides the folders of inference, rendering and models, decides what is asked and how an answer is read."""


class Adapter(Protocol):
    """What a model is asked with besides its own weights."""

    @property
    def path(self) -> str | None: ...


@dataclass(frozen=True)
class Answers:
    """One model's predictions for the test requests, and its run in MLflow."""

    path: str
    mlflow_run_id: str
    reused: bool


@task(name="run_inference", task_run_name="run_inference-{which}", cache_policy=NO_CACHE)
def run_inference(run: Run, dataset: PreparedDataset, which: Which, adapter: Adapter | None = None) -> Any:
    """Ask one model every test request; the original model's answers are reused where nothing that made them changed.

    A champion that there is not, or whose files cannot be had, is not asked: its answers are None.
    """
    if which == "champion" and (adapter is None or adapter.path is None):
        return Completed(name="Skipped", message="there is no champion that could be asked", data=None)
    stage = f"run_inference_{which}"
    digest = _baseline_digest(run, dataset) if which == "baseline" else None
    path, exists = keep(run, run.folder.inference(which), "baseline", digest)
    if exists:
        get_run_logger().info("%s: reusing %s, made from the same inputs before", stage, path)
        with child_run(run, stage, {"reused": "true"}) as child:
            _record(run, dataset, path, child, adapter)
        answers = Answers(str(path), child, reused=True)
        return Completed(name="Cached", message=f"reused {path}", data=answers)
    job = inference_job(
        run.experiment,
        run.folder,
        which,
        dataset=dataset.path,
        adapter=adapter.path if adapter else None,
        output=str(path),
    )
    done = run_stage(run, stage, job)
    _record(run, dataset, path, done.mlflow_run_id, adapter)
    return Answers(str(path), done.mlflow_run_id, reused=False)


def _record(run: Run, dataset: PreparedDataset, path: Path, child: str, adapter: Adapter | None) -> None:
    manifest = read_json(path / "manifest.json")
    # Side by side in MLflow, the two models' runs show what differs between them.
    run.tracking.log_params(
        child,
        {
            "model": run.experiment.model.name,
            "adapter": adapter.path if adapter else "none",
            "precision": manifest["precision"],
            "inference": run.experiment.inference.model_dump(mode="json"),
        },
    )
    run.tracking.log_dataset(
        child,
        name=run.experiment.dataset.title,
        digest=dataset.digest,
        source=dataset.path,
        num_rows=dataset.num_test_rows,
        context="evaluation",
    )
    run.tracking.log_metrics(
        child,
        {
            "inference/new_tokens_per_s": manifest["new_tokens_per_s"],
            "inference/num_new_tokens": manifest["num_new_tokens"],
            "inference/generation_s": manifest["generation_s"],
            "inference/num_cut": manifest["num_cut"],
            "inference/peak_memory_gbytes": manifest["peak_memory_gbytes"],
            "inference/latency_p50_s": manifest["latency_s"]["p50"],
            "inference/latency_p95_s": manifest["latency_s"]["p95"],
            "inference/latency_p99_s": manifest["latency_s"]["p99"],
            "eval/reference_loss": manifest["reference_loss"],
            "eval/plain_loss": manifest["plain_loss"],
        },
    )
    run.tracking.log_files(child, [path / "predictions.parquet"])


def _baseline_digest(run: Run, dataset: PreparedDataset) -> str | None:
    """Everything that could change the original model's answers; None where the model can change unseen."""
    model = identity(run.experiment.model)
    # What a server serves under a name may change as unseen, and so may the vLLM of an environment that is not ours.
    if model is None or run.experiment.inference.engine != "transformers":
        return None
    folder = Path(__file__).parent
    code = [p for name in ("inference", "dataset/rendering", "models") for p in (folder / name).rglob("*.py")]
    code += [folder / name for name in ASKED_BY]
    settings = run.experiment.inference.model_dump(mode="json", exclude={"adapter"})
    libraries = (*LIBRARIES, *(["bfcl-eval"] if run.experiment.inference.suites else []))
    return digest_of(
        {
            "model": model,
            "family": run.experiment.model.family,
            "dataset": dataset.digest,
            "inference": settings,
            "code": digest_of_files(code, folder),
            "libraries": {name: importlib.metadata.version(name) for name in libraries},
        }
    )
