"""Make true what is said of runs whose flow was killed: their jobs go on under a new driver, or end.

    python -m flows.reconcile                     looks at every run, and takes over or ends those nobody drives
    python -m flows.reconcile --action cancel     ends them all
    python -m flows.reconcile --dry-run           only says what it would do

A flow that is killed hard runs no hooks: Prefect and MLflow show it as running, and its job runs on. A run counts as left
when its flow stopped renewing the lease in its folder. `adopt` schedules a run that has a deployment again, whose worker then
finds the running job by its name; one that was started by hand, or was taken over often enough, is ended instead: its jobs
are cancelled, Prefect says Crashed and MLflow KILLED. Automations that `make ui` makes start this flow when a flow run has
crashed or its heartbeats stay away.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
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

from flows.local_stack import StackError, configured_stack, running_stack
from tasks.contracts.files import read_json
from tasks.contracts.job import PoolError
from tasks.contracts.run_folder import RunFolder
from tasks.lease import Lease, read_lease
from tasks.pool.cancel import cancel_run
from tasks.pool.on_disk import all_runs, read_run
from tasks.tracking.mlflow_runs import Tracking

Action = Literal["adopt", "cancel"]
MAX_TAKEOVERS = 3
"""A run that was driven so often and was left again is not taken over any more."""


@flow(name="reconcile", persist_result=False)
def reconcile(storage: str = "storage", action: Action = "adopt", is_dry_run: bool = False) -> list[dict[str, str]]:
    """Take over or end the runs that nobody drives any more.

    Args:
        storage: the runs' shared folder.
        action: `adopt`: a run with a deployment is scheduled again and finds its running job. `cancel`: every run is ended.
        is_dry_run: only say what would be done.
    """
    logger = get_run_logger()
    done: list[dict[str, str]] = []
    for name in all_runs(Path(storage).resolve()):
        experiment, folder = read_run(Path(storage).resolve(), name)
        left = read_lease(folder.owner)
        if left is None or left.is_alive:
            continue
        flow_run = asyncio.run(_flow_run(left.flow_run_id))
        what: str = _decide(flow_run, action)
        logger.info("run %s was left by %s: %s%s", name, left, what, " (dry run)" if is_dry_run else "")
        if not is_dry_run:
            try:
                if what == "adopt":
                    asyncio.run(_schedule_again(left, name))
                else:
                    cancel_run(experiment, folder)
                    _tell_both(folder, flow_run, left)
                folder.owner.unlink(missing_ok=True)
            except PoolError as error:
                # The other runs' turn comes all the same; this one's lease stays, for the next time.
                logger.error("run %s: the scheduler says: %s", name, error)
                what = f"failed: {error}"
        done.append({"run": name, "left_by": str(left), "done": what})
    if not done:
        logger.info("every run in %s is driven, or has ended", storage)
    create_table_artifact(done or [{"run": "-", "left_by": "-", "done": "nothing to do"}], key="reconcile")
    return done


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


def _tell_both(folder: RunFolder, flow_run: FlowRun | None, left: Lease) -> None:
    """Prefect and MLflow say what became of the run."""

    async def tell_prefect() -> None:
        async with get_client() as client:
            state: State[Any] = Crashed(message=f"its process is gone ({left}); its jobs were cancelled")
            await client.set_flow_run_state(UUID(left.flow_run_id), state, force=True)

    if flow_run is not None and not (flow_run.state and flow_run.state.is_final()):
        asyncio.run(tell_prefect())
    tracking = Tracking.from_environment()
    mlflow_run = read_json(folder.experiment)["mlflow_run_id"]
    tracking.end_open_children(mlflow_run, "KILLED")
    if tracking.client.get_run(mlflow_run).info.status == "RUNNING":
        tracking.end(mlflow_run, "KILLED")


def main(argv: Sequence[str] | None = None) -> int:
    import os

    parser = argparse.ArgumentParser(
        prog="python -m flows.reconcile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--storage", default="storage", help="the runs' shared folder (default: %(default)s)")
    parser.add_argument("--action", choices=["adopt", "cancel"], default="adopt", help="(default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    arguments = parser.parse_args(argv)
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
