"""Tell whether a cluster is fit to train on, which part of it is not, and how that is known.

    python -m flows.cluster_check demo                                  the values of the deployment cluster-check/demo, here
    python -m flows.cluster_check acceptance --set pool.num_nodes=1     with some of them changed
    python -m flows.cluster_check demo --set 'inject={kind: sleep}'     prove that the gates find a fault

It records in the servers that PREFECT_API_URL and MLFLOW_TRACKING_URI name, else in those of make ui; without any it
starts its own two for the time of the check. Exit status: 0 PASS or WARN, 1 ERROR (something could not be judged, or the
check itself failed), 2 the settings cannot be used, 3 FAIL, 4 SKIP (the pool was taken), 130 interrupted.
"""

import sys
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import TerminationSignal
from prefect.logging import get_run_logger
from prefect.runtime import flow_run as current_flow_run
from prefect.states import Cancelled, Completed, Failed

from flows.finetune import git_revision
from flows.in_process import INTERRUPTED, Interruption, command_line, in_process
from flows.local_stack import StackError, end_as_with_ctrl_c
from flows.outlive_worker import outlive_worker
from flows.preflight import check_pool
from flows.refused import tell_next_step
from tasks.check_cluster import conclude, measure
from tasks.cluster.report import terminal
from tasks.contracts.cluster_report import BAD_END_STATES, Report, StageOutcome, Status
from tasks.contracts.cluster_settings import STAGES, ClusterCheck
from tasks.contracts.deployments import deployment_values
from tasks.contracts.files import link, read_json, write_json
from tasks.contracts.overrides import SettingsError, apply_overrides, read_settings
from tasks.contracts.run_folder import CheckFolder
from tasks.hardware.reference import chip_of, chips, fabric_of, fabrics
from tasks.lease import lease
from tasks.pool.cancel import cancel_run
from tasks.pool.supervise import Interrupted
from tasks.run import CheckRun
from tasks.stage import cause_first
from tasks.tracking.mlflow_runs import Tracking

NAME = "cluster-check"
GOOD, ERROR, BAD_SETTINGS, FAILED, SKIPPED = 0, 1, 2, 3, 4
EXIT_STATUS = {Status.PASS: GOOD, Status.WARN: GOOD, Status.ERROR: ERROR, Status.FAIL: FAILED, Status.SKIP: SKIPPED}


def cancel_jobs(flow: Any, flow_run: FlowRun, state: State) -> None:
    """Hook of a flow run that was cancelled; in another process, so the jobs are found on disk."""
    values = flow_run.parameters["check"]
    values = values.model_dump(mode="json") if isinstance(values, ClusterCheck) else values
    check = settings_of(values, flow_run.parameters.get("overrides") or [])
    cancel_run(check, CheckFolder(check.storage, flow_run.parameters.get("run") or str(flow_run.id)))


@flow(name=NAME, on_cancellation=[cancel_jobs], on_failure=[tell_next_step], persist_result=False)
def cluster_check(check: ClusterCheck, overrides: Sequence[str] = (), run: str | None = None) -> Any:
    """Measure a cluster stage by stage and give a verdict with evidence.

    Args:
        check: every setting of the check.
        overrides: assignments that change single settings, as `thresholds.floor_share=0.9`.
        run: name of the check and its folder; empty: the flow run's id.
    """
    outlive_worker()
    check = settings_of(check.model_dump(mode="json"), overrides)
    folder = CheckFolder(check.storage, run or str(current_flow_run.id))
    check_pool(check)
    check_name(folder, str(current_flow_run.id))
    stop = threading.Event()
    # By it reconcile tells a check whose flow was killed, and ends what it left.
    with lease(folder.owner, str(current_flow_run.id), on_lost=stop.set):
        return _drive(check, folder, stop)


def _drive(check: ClusterCheck, folder: CheckFolder, stop: threading.Event) -> Any:
    """The check, from its start in MLflow to the state that Prefect shows."""
    started = start_check(check, folder, stop)
    try:
        report = run_stages(started)
    except (Interrupted, KeyboardInterrupt):
        with cause_first("KILLED"):
            started.tracking.end(started.mlflow_run_id, "KILLED")
        return Cancelled(message="stopped on request")
    except TerminationSignal:
        with cause_first("KILLED"):
            started.tracking.end(started.mlflow_run_id, "KILLED")
        raise
    except BaseException:
        with cause_first("FAILED"):
            started.tracking.end(started.mlflow_run_id, "FAILED")
        raise
    ended = mlflow_status(report.status)
    with cause_first(ended):
        started.tracking.end(started.mlflow_run_id, ended)
    get_run_logger().info("%s Report: %s", report.statement, folder.report / "cluster-check.html")
    return end_state(report.status, report.statement)


def mlflow_status(status: Status) -> Literal["FAILED", "FINISHED"]:
    """How MLflow's run of a check with that verdict ends."""
    return "FAILED" if status in BAD_END_STATES else "FINISHED"


def end_state(status: Status, statement: str) -> State:
    """How the flow run of a check with that verdict ends."""
    state: State
    if status in BAD_END_STATES:
        state = Failed(name=BAD_END_STATES[status], message=statement)
    else:
        state = Completed(name="Skipped" if status is Status.SKIP else None, message=statement)
    return state


def run_stages(run: CheckRun) -> Report:
    """The stages in their order, then the verdict, whatever became of them."""
    outcomes: dict[str, StageOutcome] = {}
    began = time.time()
    for stage in STAGES:
        outcomes[stage] = measure(run, stage, dict(outcomes))
    report: Report = conclude(run, outcomes, began)
    return report


def start_check(check: ClusterCheck, folder: CheckFolder, stop: threading.Event) -> CheckRun:
    """The check's folder and its run in MLflow."""
    tracking = Tracking.from_environment(NAME)
    tags = {
        "prefect.flow_run_id": str(current_flow_run.id or ""),
        "cluster": check.cluster,
        "injected": "no" if check.inject is None else check.inject.kind,
    }
    mlflow_run = tracking.start_parent(folder.run, tags)
    folder.root.mkdir(parents=True, exist_ok=True)
    values = {
        "check": check.model_dump(mode="json"),
        "git_revision": git_revision(),
        "mlflow_run_id": mlflow_run,
        "flow_run_id": str(current_flow_run.id or ""),
    }
    write_json(folder.check, values)
    link(folder.latest, folder.root)
    tracking.log_params(mlflow_run, check.model_dump(mode="json"))
    get_run_logger().info("check %s in %s; MLflow: %s", folder.run, folder.root, tracking.link(mlflow_run))
    return CheckRun(check, folder, tracking, mlflow_run, stop)


def check_name(folder: CheckFolder, flow_run_id: str | None = None) -> None:
    """Refuse the name of an earlier check: its measurements would be judged as this one's. A retry of its flow run may go on.

    Raises:
        SettingsError: it is taken.
    """
    path = folder.check
    if path.exists() and (flow_run_id is None or read_json(path).get("flow_run_id") != flow_run_id):
        raise SettingsError(f"there is a check {folder.run} in {folder.root.parent} already; give another --run")


def settings_of(values: dict[str, Any], overrides: Sequence[str]) -> ClusterCheck:
    """Validated settings with absolute paths."""
    check = read_settings(ClusterCheck, apply_overrides(values, list(overrides), ClusterCheck))
    _check_references(check)
    return check.model_copy(update={"storage": check.storage.resolved()})


def _check_references(check: ClusterCheck) -> None:
    """A misspelt name would take its floors away without a word.

    Raises:
        SettingsError: every name that is not in the file of references.
    """
    problems = []
    if check.chip != "auto" and chip_of(check.chip) is None:
        problems.append(f"chip={check.chip}: there are auto, {', '.join(chips())}")
    for name in ("node_fabric", "cluster_fabric"):
        value = getattr(check, name)
        if value != "auto" and fabric_of(value) is None:
            problems.append(f"{name}={value}: there are auto, {', '.join(fabrics())}")
    if problems:
        raise SettingsError("\n".join(problems))


def main() -> int:
    arguments = command_line("flows.cluster_check", __doc__, "demo, nightly, acceptance")
    end_as_with_ctrl_c()
    try:
        check = settings_of(deployment_values(arguments.deployment, NAME, "check"), arguments.set)
        folder = CheckFolder(
            check.storage, arguments.run or f"{arguments.deployment}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
        )
        check_pool(check)
        check_name(folder)
    except (SettingsError, ValueError) as error:
        print("error: these settings cannot be used:", *str(error).splitlines(), sep="\n  ", file=sys.stderr)
        return BAD_SETTINGS
    try:
        with in_process(Path(check.storage.shared)) as run_flow:
            state = run_flow(lambda: cluster_check(check=check, run=folder.run, return_state=True))
    except StackError as error:
        print(f"error: {error}", file=sys.stderr)
        return ERROR
    except Interruption as error:
        print(f"\n{error}", file=sys.stderr)
        return INTERRUPTED
    return _tell(state, folder)


def _tell(state: State, folder: CheckFolder) -> int:
    path = folder.verdict
    if state.is_cancelled():
        print(f"\n{state.message}", file=sys.stderr)
        return INTERRUPTED
    # Told from a verdict by its name: whatever lies there is then not this check's last word.
    is_judged = state.is_completed() or state.name in BAD_END_STATES.values()
    if not is_judged or not path.exists():
        print(f"\nerror: the check failed: {state.message}\nlogs: {folder.jobs}", file=sys.stderr)
        return ERROR
    report = Report.model_validate(read_json(path))
    print(terminal(report))
    print(f"report: {folder.report / 'cluster-check.html'}")
    return EXIT_STATUS[report.status]


if __name__ == "__main__":
    sys.exit(main())
