"""Flow runs of the stack: started through the deployment, waited for, and held against what MLflow and the disk say."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from mlflow.entities import Run as MlflowRun
from mlflow.tracking import MlflowClient
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun

from tasks.contracts.cluster_report import Report, Status
from tasks.contracts.files import read_json

DEPLOYMENT, CHECK = "finetune/demo", "cluster-check/demo"


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
        return self.state == "Completed" and self.mlflow == ["FINISHED"] and set(self.attempts.values()) == {1}


@dataclass(frozen=True)
class CheckEnded:
    """The same of a cluster check, with the verdict that lies on the disk and the one that MLflow has."""

    state: str
    message: str
    mlflow: list[str]
    attempts: dict[str, int]
    verdict: str
    recorded: list[str | None]

    @property
    def is_whole(self) -> bool:
        """It came to a verdict, once, and everybody says the same."""
        is_good = self.verdict in (Status.PASS.value, Status.WARN.value)
        once = self.mlflow == ["FINISHED"] and self.recorded == [self.verdict]
        return self.state == "Completed" and is_good and once and set(self.attempts.values()) == {1}


def start_run(client: SyncPrefectClient, name: str, overrides: Sequence[str], deployed_as: str = DEPLOYMENT) -> UUID:
    deployment = client.read_deployment_by_name(deployed_as)
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
    parents = _parents(flow_run.name, mlflow, "finetune")
    assert flow_run.state is not None
    return Ended(
        flow_run.state.name or "?",
        flow_run.state.message or "",
        [parent.info.status for parent in parents],
        _attempts(storage / "runs" / flow_run.name / "jobs"),
    )


def how_check_ended(flow_run: FlowRun, mlflow: MlflowClient, storage: Path) -> CheckEnded:
    parents = _parents(flow_run.name, mlflow, "cluster-check")
    folder = storage / "checks" / flow_run.name
    file = folder / "report" / "cluster-check.json"
    assert flow_run.state is not None
    return CheckEnded(
        flow_run.state.name or "?",
        flow_run.state.message or "",
        [parent.info.status for parent in parents],
        _attempts(folder / "jobs"),
        Report.model_validate(read_json(file)).status.value if file.exists() else "none",
        [parent.data.tags.get("verdict") for parent in parents],
    )


def _parents(name: str, mlflow: MlflowClient, flow: str) -> list[MlflowRun]:
    """The run in MLflow, once it has ended there too; there should be one."""
    experiment = mlflow.get_experiment_by_name(flow)
    assert experiment is not None
    deadline = time.monotonic() + 30
    while True:
        parents = mlflow.search_runs(
            [experiment.experiment_id], f"attributes.run_name = '{name}' and tags.role = 'run'"
        )
        if all(parent.info.status != "RUNNING" for parent in parents) or time.monotonic() > deadline:
            return list(parents)
        time.sleep(1)


def _attempts(jobs: Path) -> dict[str, int]:
    stages = [stage for stage in jobs.glob("*") if stage.is_dir()]
    return {stage.name: len([a for a in stage.iterdir() if a.name.isdigit()]) for stage in stages}
