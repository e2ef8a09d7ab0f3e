"""A cluster check's stages as Prefect tasks: each measures on the pool; the last one decides and reports."""

import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.logging import get_run_logger

from tasks.cluster.evidence import Evidence, history_key, read_records
from tasks.cluster.expected import compares_ranks
from tasks.cluster.inventory_gates import busy_or_missing, inventory_findings
from tasks.cluster.page import page
from tasks.cluster.reaction import reaction_told
from tasks.cluster.report import build_report, fingerprint, junit, markdown, metrics_of, prometheus, size_text
from tasks.cluster.training_figures import Points, training_figures, work_of_ranks
from tasks.cluster.training_inputs import folders, inputs_exist, training_settings
from tasks.cluster.variants import variants_of
from tasks.contracts.attempt import read_points
from tasks.contracts.cluster_report import RankRecord, Report, StageOutcome, Status, VariantOutcome
from tasks.contracts.cluster_settings import STAGES, ClusterCheck
from tasks.contracts.files import write_json, write_text
from tasks.contracts.job import FailureKind, JobFailed, JobSpec, JobState, MayStillRun, PoolError
from tasks.pool.attempts import failures_of, newest_attempt, nodes_that_never_came
from tasks.pool.failures import blamed_ranks
from tasks.pool.stage_jobs import probe_job, training_probe_job, variant_probe_job
from tasks.react import react
from tasks.run import CheckRun
from tasks.stage import run_stage

MAX_HISTORY = 30
MAX_TAG_CHARACTERS = 5000
"""Of MLflow's 8,000 for a tag's value."""
MOST_OF_IT = "most-of-it"
"""In place of so many drifted figures that their names are no tag: the whole run then stays out of the history."""
GAVE_WAY_SIGNS = ("preempt", "told to leave")
"""In what the pool says of a job that made room for another; that of a lost node is the cluster's fault, and is judged."""
CANNOT_START_SIGNS = (
    # Slurm's reasons (squeue -o %r), where nodes are missing or the partition never takes such a job.
    "down", "drain", "nodenotavail", "unavailablenodes", "not responding", "badconstraints", "partitiontimelimit",
    "partitionnodelimit", "partitioninactive", "invalid", "held",
    # Kubernetes' of nodes that are out of use.
    "proving-ground/cluster-check", "node.kubernetes.io/", "were unschedulable",
)  # fmt: skip
"""In what the pool says of a job that waits for something else than its turn."""
MISSED_IN_A_ROW = 7
"""Checks that gave way one after another, of which people are told: a cluster that nobody checks is no good news."""
LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
NEEDS: dict[str, tuple[str, ...]] = {
    "devices": ("inventory",),
    "collectives": ("inventory", "devices"),
    "storage": ("inventory",),
    "training": ("inventory", "devices", "collectives", "storage"),
    "endurance": ("inventory", "devices"),
}
"""Stages without whose end a stage says nothing of the cluster."""


@task(name="measure", task_run_name="measure-{stage}", cache_policy=NO_CACHE)
def measure(run: CheckRun, stage: str, before: dict[str, StageOutcome]) -> StageOutcome:
    """One stage, or why it was left out."""
    if stage not in run.check.stages:
        return StageOutcome(stage=stage, state="skipped", error="not asked for (stages)")
    if why := _why_not(run, stage, before):
        state = "yielded" if any(outcome.state == "yielded" for outcome in before.values()) else "skipped"
        get_run_logger().warning("%s: skipped: %s", stage, why)
        return StageOutcome.model_validate({"stage": stage, "state": state, "error": why})
    if stage == "training":
        return _training(run)
    if stage == "collectives":
        return _collectives(run, before)
    return _run_job(run, stage, probe_job(run.check, run.folder, stage))


def _why_not(run: CheckRun, stage: str, before: dict[str, StageOutcome]) -> str | None:
    for needed in NEEDS.get(stage, ()):
        outcome = before.get(needed)
        if outcome is not None and outcome.state == "yielded":
            return outcome.error
        if outcome is not None and outcome.state != "done" and needed in run.check.stages:
            return f"{needed} did not end well, and without it these figures would mean nothing"
    if before:
        records, _ = _records(run, "inventory")
        return busy_or_missing(inventory_findings(Evidence(run.check, before, {"inventory": records})))
    return None


def _run_job(run: CheckRun, stage: str, job: JobSpec) -> StageOutcome:
    """A job to its end; what became of it is evidence, whatever it is."""
    began = time.monotonic()

    def outcome(state: str, error: str = "", **more: Any) -> StageOutcome:
        values = {"stage": stage, "state": state, "error": error, "seconds": time.monotonic() - began}
        return StageOutcome.model_validate(values | more)

    try:
        run_stage(run, Path(job.folder).name, job)
    except JobFailed as failed:
        said = failed.error.summary.lower()
        if failed.state is JobState.QUEUED:
            if cannot_start(said):
                return outcome("error", f"the pool cannot start it: {failed.error.summary}")
            return outcome("yielded", f"the pool is taken by others: {failed.error.summary}")
        if failed.state is JobState.PREEMPTED and any(sign in said for sign in GAVE_WAY_SIGNS):
            return outcome("yielded", f"the pool was taken by others: {failed.error.summary}")
        if failed.state is JobState.CANCELLED:
            # By somebody: that tells nothing of the cluster.
            return outcome("error", failed.error.summary)
        get_run_logger().error("%s: %s", stage, failed)
        attempt = newest_attempt(Path(job.folder))
        assert attempt is not None
        failures = {node: failures_of(attempt, node) for node in range(job.num_nodes)}
        ranks = blamed_ranks(failures, job.num_nodes * job.processes_per_node)
        nodes = nodes_that_never_came(attempt, job.num_nodes)
        return outcome(
            "failed", failed.error.summary, culprit_ranks=tuple(ranks), culprit_nodes=tuple(nodes),
            is_own_error=failed.error.kind is FailureKind.USER,
        )  # fmt: skip
    except MayStillRun:
        # The next stage would run beside it. The check ends, and its lease stays for reconcile.
        raise
    except (PoolError, ValueError) as error:
        get_run_logger().error("%s: %s", stage, error)
        return outcome("error", str(error))
    return outcome("done")


def cannot_start(said: str) -> bool:
    """Whether a job waits for nodes that are out of use, or for ever, by the pool's own words in lower case."""
    # Kubernetes counts what keeps each node from taking a pod; of those that others use it says so.
    is_nobody = "nodes are available" in said and "insufficient" not in said
    return is_nobody or any(sign in said for sign in CANNOT_START_SIGNS)


def _collectives(run: CheckRun, before: dict[str, StageOutcome]) -> StageOutcome:
    """As NCCL does them by itself, and then the variants; what becomes of these decides nothing about the stage's end."""
    outcome = _run_job(run, "collectives", probe_job(run.check, run.folder, "collectives"))
    records = {stage: _records(run, stage)[0] for stage in ("inventory", "collectives")}
    variants: list[VariantOutcome] = []
    for kind, found in variants_of(Evidence(run.check, before | {"collectives": outcome}, records)).items():
        if isinstance(found, str):
            get_run_logger().info("collectives: %s: skipped: %s", kind, found)
            continue
        for variant in found:
            if variants and variants[-1].state == "yielded":
                # Each would wait for its turn as long as the one before.
                variants.append(variants[-1].model_copy(update={"name": variant.name}))
                continue
            job = variant_probe_job(run.check, run.folder, variant.job_name, variant.arguments())
            ended = _run_job(run, "collectives", job)
            variants.append(VariantOutcome(name=variant.name, state=ended.state, error=ended.error))
            outcome = outcome.model_copy(update={"seconds": outcome.seconds + ended.seconds})
    return outcome.model_copy(update={"variants": tuple(variants)})


def _training(run: CheckRun) -> StageOutcome:
    """One rank, one node, all of them, and all again; the first that fails ends it."""
    pool, began = run.check.pool, time.monotonic()
    # Made once, and used by every later check of the same shape and width.
    jobs = [] if inputs_exist(run.check) else [probe_job(run.check, run.folder, "training_inputs")]
    jobs += [_training_job(run, name, nodes, width) for name, (nodes, width) in widths(run).items()]
    for spec in jobs:
        ended = _run_job(run, "training", spec)
        if ended.state != "done":
            narrow = spec.num_nodes * spec.processes_per_node < pool.world_size
            told = f"{Path(spec.folder).name}: {ended.error}"
            # Ranks of a narrower run are not those of the whole pool.
            blame: dict[str, Any] = (
                {"culprit_ranks": (), "culprit_nodes": ()} if narrow and pool.backend != "local" else {}
            )
            return ended.model_copy(update={"error": told, "seconds": time.monotonic() - began, **blame})
    return StageOutcome(stage="training", state="done", seconds=time.monotonic() - began)


def widths(run: CheckRun) -> dict[str, tuple[int, int]]:
    """The training runs and how wide they are: nodes, processes on each."""
    pool = run.check.pool
    found = {"one": (1, 1)}
    if pool.num_nodes > 1 and pool.processes_per_node > 1:
        found["node"] = (1, pool.processes_per_node)
    whole = (pool.num_nodes, pool.processes_per_node)
    return found | {"all": whole, "repeat": whole}


def _training_job(run: CheckRun, name: str, nodes: int, width: int) -> JobSpec:
    model, rows = folders(run.check)
    inputs = {
        "model": {"name": str(model)},
        "dataset": str(rows),
        "training": training_settings(run.check, nodes * width).model_dump(mode="json"),
    }
    return training_probe_job(run.check, run.folder, name, inputs=inputs, num_nodes=nodes, processes_per_node=width)


@task(name="conclude", cache_policy=NO_CACHE)
def conclude(run: CheckRun, outcomes: dict[str, StageOutcome], started: float) -> Report:
    """Judge, react, write every form of the report, record, and say so when the verdict is another than before."""
    evidence = gather(run, outcomes)
    report = build_report(evidence, run.folder.run, started, time.time() - started)
    query = f"tags.role = 'run' and tags.cluster = '{run.check.cluster}' and tags.asked = '{asked(run.check)}'"
    earlier, _ = _earlier(run, query)
    trend = [
        {
            "run": r.info.run_name,
            "at": r.info.start_time / 1000,
            "verdict": r.data.tags["verdict"],
            "metrics": r.data.metrics,
        }
        for r in reversed(earlier)
        if "verdict" in r.data.tags and r.data.tags.get("injected") == "no"
    ]
    write(report, run.folder.report, trend)
    # The verdict lies on the disk before a node is touched, whatever becomes of that.
    if (reacted := react(evidence, report)) is not report:
        report = reacted
        write(report, run.folder.report, trend)
    try:
        _record(run, report)
    except MlflowException as error:
        # The verdict stands on the disk all the same.
        get_run_logger().error("MLflow has no figures of this check: %s", error)
    _show(run, report)
    before = news(report.status, [entry["verdict"] for entry in trend])
    if report.injected is None and before is not None:
        tell_change(report, before)
    return report


def news(status: Status, earlier: Sequence[str]) -> str | None:
    """What the verdict was before, where people are told: another than now, or so many checks in a row that gave way.

    Args:
        earlier: all verdicts before this one, in their order; one that gave way is none.
    """
    gave_way = list(takewhile(lambda verdict: verdict == Status.SKIP.value, reversed(earlier)))
    before = next((verdict for verdict in reversed(earlier) if verdict != Status.SKIP.value), None)
    if status is Status.SKIP:
        return (before or "none") if (len(gave_way) + 1) % MISSED_IN_A_ROW == 0 else None
    return None if before == status.value else before


def gather(run: CheckRun, outcomes: dict[str, StageOutcome]) -> Evidence:
    """Everything that the stages left, and the figures of earlier runs on the same hardware and software."""
    records: dict[str, list[RankRecord]] = {}
    unreadable: dict[str, list[tuple[int, str]]] = {}
    for stage in STAGES:
        if stage in outcomes and stage != "training":
            records[stage], unreadable[stage] = _records(run, stage)
    variants = {
        variant.name: _records(run, variant.job_name)[0]
        for found in variants_of(Evidence(run.check, outcomes, records)).values()
        if not isinstance(found, str)
        for variant in found
    }
    points: dict[str, Points] = {}
    for name in widths(run):
        folder = run.folder.job(f"training_{name}")
        newest = newest_attempt(folder) if folder.exists() else None
        if newest is not None and (newest / "result.json").exists():
            points[name] = read_points(folder)
    products = [
        figure.value
        for record in records.get("devices", ())
        for figure in record.figures
        if figure.name == "matrix_product_bfloat16_tflops_per_s" and figure.value
    ]
    figures = training_figures(points, min(products, default=None))
    is_compared = compares_ranks(run.check) and "all" in points
    of_ranks = work_of_ranks(points["all"], run.check.pool.world_size) if is_compared else ()
    evidence = Evidence(
        run.check, outcomes, records, unreadable, figures, variants=variants, training_of_ranks=of_ranks
    )
    query = (
        f"tags.role = 'run' and tags.fingerprint = '{fingerprint(evidence)}' and tags.cluster = '{run.check.cluster}' "
        "and tags.injected = 'no' and tags.verdict != 'FAIL' and tags.verdict != 'ERROR' and tags.verdict != 'SKIP'"
    )
    good, problem = _earlier(run, query)
    history: dict[str, list[float]] = {}
    for earlier in reversed(good):
        # A figure that had drifted is no measure for the next: it would become the usual one.
        drifted = set(earlier.data.tags.get("drifted", "").split(" "))
        for name, value in earlier.data.metrics.items():
            if not drifted & {name, MOST_OF_IT}:
                history.setdefault(name, []).append(value)
    notes = [problem] if problem else []
    if not problem and len(good) < run.check.thresholds.min_history:
        notes.append(
            f"{len(good)} earlier runs passed on this hardware and software: no history to compare with before "
            f"{run.check.thresholds.min_history}"
        )
    return replace(evidence, history=history, num_history=len(good), notes=notes, own_versions=_own_versions())


def _earlier(run: CheckRun, query: str) -> tuple[list[MlflowRun], str | None]:
    """Earlier runs, newest first, or why they are not known: a verdict is given without them."""
    try:
        return run.tracking.earlier_runs(query, MAX_HISTORY), None
    except MlflowException as error:
        get_run_logger().error("earlier checks cannot be read: %s", error)
        return (
            [],
            f"MLflow could not be asked for earlier runs: no history to compare with ({str(error).splitlines()[0]})",
        )


def asked(check: ClusterCheck) -> str:
    """Whose verdicts can be compared: checks of the same stages, pool and profile."""
    pool = check.pool.model_dump(mode="json", include={"num_nodes", "processes_per_node", "gpus"})
    values = [sorted(check.stages), check.thresholds.profile, pool]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _own_versions() -> dict[str, str]:
    """Of this process; its installation is the one that jobs should see."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write(report: Report, folder: Path, trend: list[dict[str, Any]]) -> None:
    """Every form of the report."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "cluster-check.junit.xml", junit(report))
    write_text(folder / "cluster-check.md", markdown(report))
    write_text(folder / "cluster-check.prom", prometheus(report))
    write_text(folder / "cluster-check.html", page(report, trend))
    # Last: it says that the others are there.
    write_json(folder / "cluster-check.json", json.loads(report.model_dump_json()))


def tell_change(report: Report, before: str) -> None:
    """An event for automations: the verdict is another than that of the run before."""
    emit_event(
        event="cluster-check.verdict-changed",
        resource={
            "prefect.resource.id": f"proving-ground.cluster.{report.cluster}",
            "prefect.resource.name": report.cluster,
        },
        payload={
            "before": before,
            "after": report.status.value,
            "run": report.run,
            "statement": report.statement,
            "suspects": [suspect.place for suspect in report.suspects[:10]],
        },
    )
    get_run_logger().warning("the verdict of %s changed from %s to %s", report.cluster, before, report.status.value)


def _records(run: CheckRun, stage: str) -> tuple[list[RankRecord], list[tuple[int, str]]]:
    folder = run.folder.job(stage)
    newest = newest_attempt(folder) if folder.exists() else None
    return read_records(newest) if newest is not None else ([], [])


def _record(run: CheckRun, report: Report) -> None:
    tracking, run_id = run.tracking, run.mlflow_run_id
    tracking.log_metrics(run_id, metrics_of(report))
    counts = {f"gates/{s.value}": float(sum(f.status is s for f in report.findings)) for s in Status}
    tracking.log_metrics(run_id, counts)
    drifted = " ".join(drifted_keys(report))
    tags = {
        "fingerprint": report.fingerprint,
        "chip": report.chip,
        "asked": asked(run.check),
        "drifted": drifted if len(drifted) <= MAX_TAG_CHARACTERS else MOST_OF_IT,
        "suspects": ", ".join(suspect.place for suspect in report.suspects)[:MAX_TAG_CHARACTERS],
        "reaction": reaction_told(report.reaction)[:MAX_TAG_CHARACTERS],
        # Last: a run with a verdict is one whose figures are all there.
        "verdict": report.status.value,
    }
    for name, value in tags.items():
        tracking.client.set_tag(run_id, name, value)
    tracking.log_folder(run_id, run.folder.report, "report")


def drifted_keys(report: Report) -> list[str]:
    """Under which names the history keeps the figures that have drifted from it."""
    off = {(f.stage, f.gate, f.size_bytes, place) for f in report.findings if f.layer == "history" and f.status is not Status.PASS
           for place in f.culprits}  # fmt: skip
    return [
        history_key(placed)
        for placed in report.figures
        if (placed.stage, placed.figure.name, placed.figure.size_bytes, placed.place) in off
    ]


def _show(run: CheckRun, report: Report) -> None:
    create_markdown_artifact(markdown(report), key="cluster-check", description=report.statement)
    rows = [
        {"stage": f.stage, "gate": f.gate, "size": size_text(f.size_bytes), "verdict": f.status.value, "value": f.value,
         "limit": f.limit, "layer": f.layer, "who": ", ".join(f.culprits)}
        for f in report.findings
    ]  # fmt: skip
    create_table_artifact(rows, key="gates", description="Every gate of this check")
    create_link_artifact(run.tracking.link(run.mlflow_run_id), "MLflow run", key="mlflow", description=report.run)
