"""Make true what is said of runs and cluster checks whose flow was killed: their jobs go on under a new driver, or end.

    python -m flows.reconcile                     looks at every one, and takes over or ends those nobody drives
    python -m flows.reconcile --action cancel     ends them all
    python -m flows.reconcile --dry-run           only says what it would do

A flow that is killed hard runs no hooks: Prefect and MLflow show it as running, and its job runs on. A run counts as left
when its flow stopped renewing the lease in its folder. `adopt` schedules a run that has a deployment again, whose worker then
finds the running job by its name; one that was started by hand, or was taken over often enough, is ended instead: its jobs
are cancelled, Prefect says Crashed and MLflow KILLED. A cluster check is always ended and never started again: half a
measurement says nothing of a cluster, and its pool is wanted back at once. One that had written its verdict before its flow
died ends by that. Automations that `make deploy` makes start this flow when a flow run has crashed or its heartbeats stay away.
"""

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed, Scheduled

from flows.cluster_check import end_state, mlflow_status
from flows.local_stack import StackError, configured_stack, running_stack
from flows.outlive_worker import outlive_worker
from tasks.contracts.cluster_report import Report
from tasks.contracts.files import read_json
from tasks.contracts.run_folder import CheckFolder, RunFolder
from tasks.contracts.settings import StorageSettings
from tasks.lease import Lease, give_back, read_lease
from tasks.pool.backends import UsesPool
from tasks.pool.cancel import cancel_run
from tasks.pool.on_disk import all_checks, all_runs, read_check, read_run
from tasks.tracking.mlflow_runs import Status as MlflowStatus
from tasks.tracking.mlflow_runs import Tracking

Action = Literal["adopt", "cancel"]
MAX_TAKEOVERS = 3
"""A run that was driven so often and was left again is not taken over any more."""


@flow(name="reconcile", persist_result=False)
def reconcile(storage: str = "storage", action: Action = "adopt", is_dry_run: bool = False) -> list[dict[str, str]]:
    """Take over or end the runs, and end the cluster checks, that nobody drives any more.

    Args:
        storage: the runs' shared folder.
        action: `adopt`: a run with a deployment is scheduled again and finds its running job. `cancel`: every run is ended.
        is_dry_run: only say what would be done.

    Raises:
        NotADirectoryError: there is no such folder.
    """
    outlive_worker()
    logger = get_run_logger()
    done: list[dict[str, str]] = []
    root = Path(storage).resolve()
    unseen = _unseen(root)
    # A new site's storage is empty until its first run; one that is not there is a wrong path, or is not mounted.
    if unseen and not root.is_dir():
        raise NotADirectoryError(unseen)
    everything = [(RunFolder, name) for name in all_runs(root)] + [(CheckFolder, name) for name in all_checks(root)]
    for kind, name in everything:
        left: Lease | None = None
        try:
            left = read_lease(kind(StorageSettings(shared=str(root)), name).owner)
            if left is None or left.is_alive:
                continue
            run = _read(root, name, kind)
            what: str = _take_over_or_end(run, left, action, is_dry_run=is_dry_run)
        except Exception as error:
            # Of one run, whatever it is; the others' turn comes all the same, and this one's lease stays for the next time.
            what = f"failed: {type(error).__name__}: {error}"
        by = str(left or "nobody can tell whom")
        logger.log(
            logging.ERROR if what.startswith("failed") else logging.INFO,
            "%s %s was left by %s: %s%s",
            "check" if kind is CheckFolder else "run", name, by, what, " (dry run)" if is_dry_run else "",
        )  # fmt: skip
        done.append({"run": name, "left_by": by, "done": what})
    if unseen:
        logger.warning(unseen)
    elif not done:
        logger.info("every run and every check in %s is driven, or has ended", root)
    create_table_artifact(done or [{"run": "-", "left_by": "-", "done": "nothing to do"}], key="reconcile")
    return done


def _unseen(root: Path) -> str | None:
    """Why nothing can be said of the runs of a folder: none was ever made there."""
    if any((root / folder).is_dir() for folder in ("runs", "checks")):
        return None
    return (
        f"{root} has neither runs/ nor checks/, so that no run was looked at: name the runs' folder with --storage, or in the "
        "site's parameters of reconcile/left-runs, and see that it is mounted"
    )


@dataclass(frozen=True)
class _Left:
    """A run or a cluster check that may have been left.

    Attributes:
        record: the file that names its run in MLflow.
        ended: how it ended before its flow died, where it did.
    """

    settings: UsesPool
    folder: RunFolder
    record: Path
    is_check: bool
    ended: Report | None = None


def _read(root: Path, name: str, kind: type[RunFolder]) -> _Left:
    if kind is not CheckFolder:
        experiment, folder = read_run(root, name)
        return _Left(experiment, folder, folder.experiment, is_check=False)
    check, check_folder = read_check(root, name)
    verdict = check_folder.verdict
    report = Report.model_validate(read_json(verdict)) if verdict.exists() else None
    return _Left(check, check_folder, check_folder.check, is_check=True, ended=report)


def _take_over_or_end(run: _Left, left: Lease, action: Action, *, is_dry_run: bool) -> str:
    """Do what is to be done with one of them, and say it."""
    folder = run.folder
    flow_run = asyncio.run(_flow_run(left.flow_run_id))
    what = "cancel" if run.is_check else _decide(flow_run, action)
    if is_dry_run:
        return what
    # Somebody may have retried it meanwhile; its new process takes the lease only after a while.
    again = read_lease(folder.owner)
    if again is None or again.is_alive or _has_begun_anew(flow_run, again):
        return "driven again"
    if what == "adopt":
        asyncio.run(_schedule_again(left, folder.run))
    else:
        cancel_run(run.settings, folder)
        _tell_both(run, flow_run, left)
    give_back(folder.owner, left.identity)
    return what


def _has_begun_anew(flow_run: FlowRun | None, left: Lease) -> bool:
    """Whether the flow run was started, or is about to be, after its last sign of life."""
    if flow_run is None or flow_run.state is None:
        return False
    since = datetime.now(UTC) - flow_run.state.timestamp
    is_coming = flow_run.state.is_pending() or flow_run.state.is_running() or flow_run.state.is_scheduled()
    return is_coming and since.total_seconds() < left.age_s


def _decide(flow_run: FlowRun | None, action: Action) -> Action:
    if action == "cancel" or flow_run is None or flow_run.deployment_id is None:
        return "cancel"
    # Whoever else ended it meant it; a crash is what a retry is for.
    has_ended = flow_run.state is not None and flow_run.state.is_final() and not flow_run.state.is_crashed()
    return "cancel" if has_ended or flow_run.run_count >= MAX_TAKEOVERS else "adopt"


async def _flow_run(flow_run_id: str) -> FlowRun | None:
    async with get_client() as client:
        try:
            return await client.read_flow_run(UUID(flow_run_id))
        except (ObjectNotFound, ValueError):
            # Of another server, or run without one.
            return None


async def _schedule_again(left: Lease, run: str) -> None:
    async with get_client() as client:
        state: State[Any] = Scheduled(
            name="AwaitingRetry", message=f"run {run} was left by {left}; going on with its job"
        )
        await client.set_flow_run_state(UUID(left.flow_run_id), state, force=True)


def _tell_both(run: _Left, flow_run: FlowRun | None, left: Lease) -> None:
    """Prefect and MLflow say what became of it."""
    state: State[Any] = Crashed(message=f"its process is gone ({left}); its jobs were cancelled")
    status: MlflowStatus = "KILLED"
    if run.ended is not None:
        state, status = end_state(run.ended.status, run.ended.statement), mlflow_status(run.ended.status)

    async def tell_prefect() -> None:
        async with get_client() as client:
            await client.set_flow_run_state(UUID(left.flow_run_id), state, force=True)

    if flow_run is not None and not (flow_run.state and flow_run.state.is_final()):
        asyncio.run(tell_prefect())
    tracking = Tracking.from_environment()
    mlflow_run = read_json(run.record)["mlflow_run_id"]
    tracking.end_open_children(mlflow_run, "KILLED")
    if tracking.client.get_run(mlflow_run).info.status == "RUNNING":
        tracking.end(mlflow_run, status)


def main(argv: Sequence[str] | None = None) -> int:
    import os

    parser = argparse.ArgumentParser(
        prog="python -m flows.reconcile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--storage", default="storage", help="the runs' shared folder (default: %(default)s)")
    parser.add_argument("--action", choices=["adopt", "cancel"], default="adopt", help="(default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    arguments = parser.parse_args(argv)
    # Whoever asks by hand means some run: an empty folder is no answer to them either.
    if unseen := _unseen(Path(arguments.storage).resolve()):
        print(f"error: {unseen}", file=sys.stderr)
        return 1
    try:
        addresses = configured_stack() or running_stack()
        if addresses is None:
            raise StackError("no Prefect and MLflow to tell: start them (make ui), or set PREFECT_API_URL and "
                             "MLFLOW_TRACKING_URI")  # fmt: skip
    except StackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    os.environ.update(addresses.environment())
    with temporary_settings({PREFECT_API_URL: addresses.prefect_api}):
        done = reconcile(arguments.storage, arguments.action, arguments.dry_run)
    for row in done:
        print(f"{row['run']}: {row['done']} (left by {row['left_by']})")
    return 1 if any(row["done"].startswith("failed") for row in done) else 0


if __name__ == "__main__":
    sys.exit(main())
