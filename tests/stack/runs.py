"""Flow runs of the stack: started through the deployment, waited for, and held against what MLflow and the disk say."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from mlflow.tracking import MlflowClient
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun

DEPLOYMENT = "finetune/demo"


@dataclass(frozen=True)
class Ended:
    """How a run ended, by everyone who knows of it."""

    state: str
    message: str
    mlflow: list[str]
    attempts: dict[str, int]

    @property
    def is_whole(self) -> bool:
        """It finished once: one parent run in MLflow, one attempt of each stage, no more."""
        return self.state == "Completed" and self.mlflow == ["FINISHED"] and set(self.attempts.values()) <= {1}


def start_run(client: SyncPrefectClient, name: str, overrides: Sequence[str]) -> UUID:
    deployment = client.read_deployment_by_name(DEPLOYMENT)
    parameters = {"overrides": list(overrides), "run": name}
    return client.create_flow_run_from_deployment(deployment.id, parameters=parameters, name=name).id


def wait_for_end(client: SyncPrefectClient, run: UUID, limit_s: float) -> FlowRun:
    """Whatever the servers do meanwhile; the last word counts."""
    deadline = time.monotonic() + limit_s
    while True:
        flow_run = client.read_flow_run(run)
        if flow_run.state is not None and flow_run.state.is_final():
            return flow_run
        if time.monotonic() > deadline:
            raise SystemExit(
                f"{flow_run.name} is {flow_run.state.name if flow_run.state else 'nothing'} after {limit_s:g} s"
            )
        time.sleep(1)


def how_it_ended(flow_run: FlowRun, mlflow: MlflowClient, storage: Path) -> Ended:
    experiment = mlflow.get_experiment_by_name("finetune")
    assert experiment is not None
    name = flow_run.name
    deadline = time.monotonic() + 30
    while True:
        parents = mlflow.search_runs(
            [experiment.experiment_id], f"attributes.run_name = '{name}' and tags.role = 'run'"
        )
        statuses = [parent.info.status for parent in parents]
        if "RUNNING" not in statuses or time.monotonic() > deadline:
            break
        time.sleep(1)
    jobs = storage / "runs" / name / "jobs"
    attempts = {
        stage.name: len([a for a in stage.iterdir() if a.name.isdigit()]) for stage in jobs.iterdir() if stage.is_dir()
    }
    assert flow_run.state is not None
    return Ended(flow_run.state.name or "?", flow_run.state.message or "", statuses, attempts)
