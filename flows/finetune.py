"""Prove a GPU pool with a real fine-tune: dataset, original model, LoRA training, fine-tuned model, comparison.

    python -m flows.finetune demo                                  the values of the deployment finetune/demo, here
    python -m flows.finetune demo --set training.num_epochs=2      with some of them changed
    python -m flows.finetune demo --set dataset.sources=rows.jsonl --set dataset.max_rows=500

It records in the servers that PREFECT_API_URL and MLFLOW_TRACKING_URI name, else in those of make ui; without any it
starts its own two for the time of the run. Exit status: 0 the gates passed, 1 something failed, 2 the settings cannot be
used, 3 the gates did not pass, 130 interrupted.
"""

import importlib.metadata
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import TerminationSignal
from prefect.futures import as_completed
from prefect.logging import get_run_logger
from prefect.runtime import flow_run as current_flow_run
from prefect.states import Cancelled, Completed, Failed

from flows.in_process import INTERRUPTED, Interruption, command_line, in_process
from flows.local_stack import REPOSITORY, StackError, end_as_with_ctrl_c
from flows.outlive_worker import outlive_worker
from flows.preflight import check_experiment
from flows.refused import tell_next_step
from flows.timing import print_timing
from tasks.compare_models import compare_models
from tasks.contracts.comparison import Comparison
from tasks.contracts.deployments import deployment_values
from tasks.contracts.files import link, write_json
from tasks.contracts.overrides import SettingsError, apply_overrides, read_experiment
from tasks.contracts.run_folder import RunFolder
from tasks.contracts.settings import Experiment
from tasks.fetch_champion import Champion, fetch_champion
from tasks.lease import lease
from tasks.pool.cancel import cancel_run
from tasks.pool.supervise import Interrupted
from tasks.prepare_dataset import prepare_dataset
from tasks.run import Run
from tasks.run_inference import Answers, run_inference
from tasks.stage import cause_first
from tasks.tracking.mlflow_runs import Status, Tracking
from tasks.train_adapter import train_adapter

PASSED, ERROR, BAD_SETTINGS, GATES_FAILED = 0, 1, 2, 3


def cancel_jobs(flow: Any, flow_run: FlowRun, state: State) -> None:
    """Hook of a flow run that was cancelled; in another process, so the jobs are found on disk."""
    parameters = flow_run.parameters
    values = parameters["experiment"]
    values = values.model_dump(mode="json") if isinstance(values, Experiment) else values
    experiment = read_experiment(apply_overrides(values, parameters.get("overrides") or []))
    name = parameters.get("run") or str(flow_run.id)
    folder = RunFolder(experiment.storage.resolved(), name)
    cancel_run(experiment, folder)


# A crash leaves the job to whoever takes the run over (a retry, or flows/reconcile.py), and so has no hook.
@flow(name="finetune", on_cancellation=[cancel_jobs], on_failure=[tell_next_step], persist_result=False)
def finetune(experiment: Experiment, overrides: Sequence[str] = (), run: str | None = None) -> Any:
    """Fine-tune a model for function calling and compare it with the original.

    Args:
        experiment: every setting of the run.
        overrides: assignments that change single settings, as `training.num_epochs=2`.
        run: name of the run and its folder; empty: the flow run's id. A retry of the same name resumes.
    """
    outlive_worker()
    experiment = read_experiment(apply_overrides(experiment.model_dump(mode="json"), list(overrides)))
    experiment = experiment.model_copy(update={"storage": experiment.storage.resolved()})
    folder = RunFolder(experiment.storage, run or str(current_flow_run.id))
    check_experiment(experiment, folder)
    stop = threading.Event()
    with lease(folder.owner, str(current_flow_run.id), on_lost=stop.set):
        return _drive(experiment, folder, stop)


def _drive(experiment: Experiment, folder: RunFolder, stop: threading.Event) -> Any:
    """The run, from its start in MLflow to the state that Prefect shows."""
    started = start_run(experiment, folder, stop)
    try:
        comparison = run_stages(started)
    except (Interrupted, KeyboardInterrupt):
        with cause_first("KILLED"):
            end_run(started, "KILLED")
        return Cancelled(message="stopped on request; finished stages are kept for the next run")
    except TerminationSignal:
        # The worker ends a cancelled run so; it also says the state.
        with cause_first("KILLED"):
            end_run(started, "KILLED")
        raise
    except BaseException:
        with cause_first("FAILED"):
            end_run(started, "FAILED")
        raise
    verdict = "PASS" if comparison.passed else "FAIL"
    get_run_logger().info("%s. %s Report: %s", verdict, comparison.statement, started.folder.report / "comparison.html")
    if comparison.passed:
        end_run(started, "FINISHED")
        return Completed(message=f"PASS. {comparison.statement}")
    # Every stage ended well, also one of whose end a server was not told at the time.
    started.tracking.end_open_children(started.mlflow_run_id, "FINISHED")
    end_run(started, "FAILED")
    missed = "; ".join(f"{g.description}: {g.value} against {g.threshold}" for g in comparison.gates if not g.passed)
    return Failed(name="GatesFailed", message=f"FAIL. Gates not met: {missed}. {comparison.statement}")


def run_stages(run: Run) -> Comparison:
    """The sentence that describes the pipeline."""
    futures: list[Any] = []
    try:
        dataset = prepare_dataset.submit(run)
        futures.append(dataset)
        prepared = dataset.result()
        # Neither needs the other: a pool with room runs them side by side. The fine-tuned model's turn comes with its adapter.
        original = run_inference.submit(run, prepared, "baseline")
        adapter = train_adapter.submit(run, prepared)
        needs: Any = None if run.experiment.inference.adapter == "none" else adapter
        finetuned = run_inference.submit(run, prepared, "finetuned", needs)
        trained: Any = adapter
        champion: Any = fetch_champion.submit(run, trained) if run.experiment.ask_champion else None
        of_champion = run_inference.submit(run, prepared, "champion", champion) if champion else None
        stages = [future for future in (original, adapter, finetuned, champion, of_champion) if future]
        futures += stages
        # Whichever fails first ends the run at once, however long the others would take.
        for stage in as_completed(stages):
            if stage is not of_champion:
                stage.result()
        comparison: Comparison = compare_models(
            run, prepared, original.result(), finetuned.result(), adapter.result(), *_of_champion(champion, of_champion)
        )
        return comparison
    except BaseException:
        # One stage failed or someone asked us to stop: the others' jobs end too, and are waited for.
        run.stop.set()
        for future in futures:
            # A stage that we stop says Interrupted; what stopped us is the other's error, or the person's wish.
            with suppress(Interrupted):
                future.wait()
        raise


def _of_champion(champion: Any, answers: Any) -> tuple[Champion | None, Answers | None]:
    """The champion and its answers: without these where its job failed, which the report says; nothing where nobody asked."""
    if answers is None:
        return None, None
    found: Champion | None = champion.result()
    try:
        return found, answers.result()
    except Exception as error:
        # What the run was for is there without it. A stop is none of these.
        get_run_logger().error("the champion could not be asked: %s", error)
        return found and replace(found, why_not=f"its job failed: {error}"), None


def start_run(experiment: Experiment, folder: RunFolder, stop: threading.Event) -> Run:
    """The run's folder and its parent run in MLflow."""
    name = folder.run
    tracking = Tracking.from_environment()
    mlflow_run = tracking.start_parent(name, {"prefect.flow_run_id": str(current_flow_run.id or "")})
    folder.root.mkdir(parents=True, exist_ok=True)
    write_json(
        folder.experiment,
        {
            "experiment": experiment.model_dump(mode="json"),
            "git_revision": git_revision(),
            "libraries": library_versions(),
            "mlflow_run_id": mlflow_run,
            "started": datetime.now(UTC).isoformat(),
        },
    )
    link(folder.latest, folder.root)
    tracking.log_params(mlflow_run, experiment.model_dump(mode="json"))
    tracking.log_files(mlflow_run, [folder.experiment])
    logger = get_run_logger()
    logger.info("run %s in %s", name, folder.root)
    logger.info("MLflow: %s", tracking.link(mlflow_run))
    return Run(experiment, folder, tracking, mlflow_run, stop)


def end_run(run: Run, status: Status) -> None:
    """Make MLflow say what happened."""
    run.tracking.end_open_children(run.mlflow_run_id, status)
    run.tracking.end(run.mlflow_run_id, status)


def library_versions() -> dict[str, str | None]:
    """Of what shapes a run; None: not installed where the flow runs, as torch in the flows' image."""
    # MLflow's client is a distribution of its own, which the whole one brings as well.
    distributions = {"mlflow": "mlflow-skinny"} | {name: name for name in ("prefect", "torch", "transformers", "trl")}

    def version(distribution: str) -> str | None:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(distribution) for name, distribution in sorted(distributions.items())}


def git_revision() -> str | None:
    """The commit of this code, with a mark when files differ from it; None outside a checkout."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=REPOSITORY, capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


def main() -> int:
    started = time.time()
    arguments = command_line(
        "flows.finetune", __doc__, "demo, demo-slurm, poc, ...", again="; the same name again resumes"
    )
    end_as_with_ctrl_c()
    try:
        values = deployment_values(arguments.deployment)
        experiment = read_experiment(apply_overrides(values, arguments.set))
        experiment = experiment.model_copy(update={"storage": experiment.storage.resolved()})
        name = arguments.run or f"{arguments.deployment}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
        folder = RunFolder(experiment.storage, name)
        check_experiment(experiment, folder)
    except (SettingsError, ValueError) as error:
        print(_listed("these settings cannot be used", error), file=sys.stderr)
        return BAD_SETTINGS
    try:
        with in_process(Path(experiment.storage.shared)) as run_flow:
            state = run_flow(lambda: finetune(experiment=experiment, run=name, return_state=True))
    except StackError as error:
        print(f"error: {error}", file=sys.stderr)
        return ERROR
    except Interruption as error:
        print(f"\n{error}; what was finished is kept for the next run", file=sys.stderr)
        return INTERRUPTED
    print_timing(folder, started)
    return _conclude(state, folder)


def _conclude(state: State, folder: RunFolder) -> int:
    report = folder.report / "comparison.html"
    if state.is_completed():
        print(f"\n{state.message}\nreport: {report}")
        return PASSED
    if state.is_cancelled():
        print(f"\nstopped. {state.message}", file=sys.stderr)
        return INTERRUPTED
    print(f"\n{_listed('the run failed', state.message or state.name or 'unknown')}", file=sys.stderr)
    if state.name == "GatesFailed":
        print(f"report: {report}", file=sys.stderr)
        return GATES_FAILED
    print(f"logs: {folder.jobs}", file=sys.stderr)
    return ERROR


def _listed(what: str, error: object) -> str:
    return f"error: {what}:\n" + "\n".join(f"  {line}" for line in str(error).splitlines())


if __name__ == "__main__":
    sys.exit(main())
