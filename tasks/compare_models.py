"""Stage: both models' answers to a verdict, a report and a registered adapter."""

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from tasks.contracts.attempt import read_points
from tasks.contracts.comparison import ChampionFigures, Comparison, ModelFigures
from tasks.contracts.files import read_json
from tasks.contracts.prediction import Prediction, prediction_from_record
from tasks.contracts.suite import SuiteFigures
from tasks.dataset.bfcl import PREFIX as BFCL
from tasks.dataset.bfcl import read_bfcl
from tasks.dataset.stored import read_examples
from tasks.evaluation.bfcl import score_bfcl
from tasks.evaluation.compare import against_champion, champion_not_asked, compare
from tasks.evaluation.measure import measure
from tasks.fetch_champion import Champion
from tasks.prepare_dataset import PreparedDataset
from tasks.report.build import ReportInputs, build_report
from tasks.run import Run
from tasks.run_inference import Answers
from tasks.stage import child_run
from tasks.train_adapter import TrainedAdapter

STAGE = "compare_models"
LIBRARIES = ("prefect", "mlflow", "torch", "transformers", "trl", "peft", "datasets")


@task(name=STAGE, cache_policy=NO_CACHE)
def compare_models(
    run: Run,
    dataset: PreparedDataset,
    original: Answers,
    finetuned: Answers,
    adapter: TrainedAdapter,
    champion: Champion | None = None,
    of_champion: Answers | None = None,
) -> Comparison:
    """Score, compare, report, register.

    Args:
        champion: the present one, where it was to be asked.
        of_champion: its answers, where it could be.
    """
    with child_run(run, STAGE) as child:
        examples = read_examples(Path(dataset.path) / "test.parquet")
        check_comparable("original", original, finetuned)
        points = read_points(run.folder.job("train_adapter"))
        measured = measure(run.folder, adapter.figures, points)
        before, after = _predictions(original), _predictions(finetuned)
        comparison = compare(examples, _of_test(before), _of_test(after), run.experiment.gates, measured)
        against = None
        if champion and not of_champion:
            against = champion_not_asked(champion.version, champion.why_not)
        elif champion and of_champion:
            check_comparable("champion", of_champion, finetuned)
            theirs = _of_test(_predictions(of_champion))
            against = against_champion(examples, theirs, _of_test(after), champion.version)
        inputs = ReportInputs(
            run=run.folder.run,
            model=run.experiment.model.name,
            dataset=run.experiment.dataset.title,
            quality=read_json(Path(dataset.path) / "quality.json"),
            training=adapter.figures,
            points=points,
            measured=measured,
            suite=_suite(run, before, after),
            champion=against,
            provenance=_provenance(run, dataset, adapter),
        )
        build_report(comparison, inputs, run.folder.report)
        _record(run, child, comparison, original, finetuned, adapter, dataset, against)
    _show(run, comparison, (run.folder.report / "comparison.md").read_text(encoding="utf-8"))
    return comparison


def check_comparable(who: str, other: Answers, finetuned: Answers) -> None:
    """Refuse two models' answers that were computed in different number formats: the difference would not be theirs.

    Raises:
        ValueError: they were; ``auto`` chose differently on the two machines, answers of before being reused.
    """
    before, after = (read_json(Path(each.path) / "manifest.json")["precision"] for each in (other, finetuned))
    if before != after:
        raise ValueError(
            f"the {who} model answered in {before} ({other.path}), the fine-tuned one in {after} ({finetuned.path}); "
            f"set inference.precision={after}, and the {who} is asked again"
        )


def _of_test(predictions: Sequence[Prediction]) -> list[Prediction]:
    return [p for p in predictions if not p.example_id.startswith(BFCL)]


def _suite(run: Run, original: Sequence[Prediction], finetuned: Sequence[Prediction]) -> SuiteFigures | None:
    settings = run.experiment.inference
    if "bfcl" not in settings.suites:
        return None
    before, after = ({p.example_id: p for p in predictions} for predictions in (original, finetuned))
    return score_bfcl(read_bfcl(settings.suite_rows_per_category), before, after)


def _predictions(answers: Answers) -> list[Prediction]:
    return [prediction_from_record(r) for r in pq.read_table(Path(answers.path) / "predictions.parquet").to_pylist()]


def _provenance(run: Run, dataset: PreparedDataset, adapter: TrainedAdapter) -> dict[str, Any]:
    return {
        "settings": run.experiment.model_dump(mode="json"),
        "dataset_sha256": dataset.digest,
        "base_weights_sha256": adapter.figures["base_weights_sha256"],
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def _record(
    run: Run,
    child: str,
    comparison: Comparison,
    original: Answers,
    finetuned: Answers,
    adapter: TrainedAdapter,
    dataset: PreparedDataset,
    against: ChampionFigures | None,
) -> None:
    tracking = run.tracking
    # The same names on both runs: selecting the two in the MLflow UI compares the models.
    tracking.log_metrics(original.mlflow_run_id, _figures(comparison, "original"))
    tracking.log_metrics(finetuned.mlflow_run_id, _figures(comparison, "finetuned"))
    primary = comparison.groups[0]
    summary: dict[str, float | None] = {
        "comparison/difference": primary.paired.difference,
        "comparison/difference_low": primary.paired.low,
        "comparison/difference_high": primary.paired.high,
        "comparison/p_value": primary.paired.p_value,
        "comparison/passed": float(comparison.passed),
    }
    if against is not None and against.exact_match is not None and against.paired is not None:
        summary["champion/exact_match"] = against.exact_match.value
        summary["champion/difference"] = against.paired.difference
        summary["champion/p_value"] = against.paired.p_value
    for run_id in (child, run.mlflow_run_id):
        tracking.log_metrics(run_id, summary)
        tracking.client.set_tag(run_id, "verdict", "PASS" if comparison.passed else "FAIL")
    tracking.log_metrics(run.mlflow_run_id, _figures(comparison, "finetuned"))
    tracking.log_folder(child, run.folder.report, "report")
    tracking.log_folder(run.mlflow_run_id, run.folder.report, "report")
    tracking.log_table(original.mlflow_run_id, evaluation_table(comparison, "original"), "evaluation.json")
    tracking.log_table(finetuned.mlflow_run_id, evaluation_table(comparison, "finetuned"), "evaluation.json")
    exact_match = primary.finetuned.exact_match.value
    model = run.experiment.model
    tags = {
        "verdict": "PASS" if comparison.passed else "FAIL",
        "run": run.folder.run,
        "dataset_sha256": dataset.digest,
        "base_model": model.name,
        "base_revision": model.revision or "none given",
        "base_weights_sha256": adapter.figures["base_weights_sha256"],
        "exact_match": "" if exact_match is None else str(exact_match),
    }
    version, why = tracking.register_adapter(
        model=model.name,
        run_id=adapter.mlflow_run_id,
        tags={name: value for name, value in tags.items() if value},
        passed=comparison.passed,
        against=against,
    )
    tracking.client.set_tag(run.mlflow_run_id, "registered", f"{version} {why}")
    get_run_logger().info("registered the adapter as %s, which %s", version, why)


def evaluation_table(comparison: Comparison, which: Literal["original", "finetuned"]) -> dict[str, list[str]]:
    """One model's answers, with the same columns and rows for both, so that MLflow shows them side by side."""
    examples = comparison.examples
    right = ("kept", "broken") if which == "original" else ("kept", "fixed")
    return {
        "request": [e.request for e in examples],
        "category": [e.category for e in examples],
        "slice": [e.slice for e in examples],
        "expected": [e.expected for e in examples],
        "answer": [getattr(e, which) for e in examples],
        "outcome": [
            "unscored" if e.kind == "unscored" else "correct" if e.kind in right else "wrong" for e in examples
        ],
        "reason": [getattr(e, f"{which}_reason") for e in examples],
    }


def _figures(comparison: Comparison, model: str) -> dict[str, float | None]:
    metrics: dict[str, float | None] = {}
    for group in comparison.groups:
        figures: ModelFigures = getattr(group, model)
        prefix = "eval/" if group is comparison.groups[0] else f"eval/{group.name}/"
        metrics[f"{prefix}exact_match"] = figures.exact_match.value
        metrics[f"{prefix}exact_match_lenient"] = figures.exact_match_lenient.value
        metrics[f"{prefix}call_name"] = figures.call_name.value
        metrics[f"{prefix}arguments"] = figures.arguments.value
        metrics[f"{prefix}arguments_given"] = figures.arguments_given.value
        metrics[f"{prefix}fits_schema"] = figures.fits_schema.value
        metrics[f"{prefix}parse_rate"] = figures.parse_rate.value
        metrics[f"{prefix}call_rate"] = figures.call_rate.value
        metrics[f"{prefix}num_unscored"] = figures.num_unscored
    return metrics


def _show(run: Run, comparison: Comparison, markdown: str) -> None:
    create_markdown_artifact(markdown, key="comparison", description=comparison.statement)
    rows = [
        {
            "requests": group.title,
            "n": group.n,
            "original": _percent(group.original.exact_match.value),
            "fine-tuned": _percent(group.finetuned.exact_match.value),
            "p": "" if group.paired.p_value is None else f"{group.paired.p_value:.2g}",
        }
        for group in comparison.groups
    ]
    create_table_artifact(rows, key="exact-match", description="Exact match, original and fine-tuned")
    create_link_artifact(run.tracking.link(run.mlflow_run_id), "MLflow run", key="mlflow", description=run.folder.run)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
