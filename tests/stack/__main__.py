"""The stack of compose.yaml on this machine, with a real PostgreSQL: ``python -m tests.stack [PART ...]`` (``make stack-test``).

    start        from nothing to both servers and every deployment, in seconds
    access       without credentials, or with wrong ones, nobody gets in
    run          one tiny fine-tuning run from the deployment to FINISHED
    schedule     a run that nobody starts, and no server with a traceback in its log
    kill         prefect, mlflow, postgres, worker: each killed with -9 in the middle of a run and started again
    silent       a flow and its worker killed together, as when their node dies: its heartbeats stay away, and it is taken over
    concurrent   RUNS (20) at once, every fourth of them a cluster check
    backup       dumped, the databases dropped, restored: old runs open as before

Parts run in this order, whichever are named; none: all of them. In the environment SERVICES narrows ``kill`` and REPEAT (1)
repeats it, RUNS narrows ``concurrent``. Exit status 0: everything held.
"""

import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import httpx
import psutil
from mlflow.tracking import MlflowClient
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows.local_stack import end_as_with_ctrl_c
from tests.conftest import REPOSITORY
from tests.integration.planted import ARGUMENTS, files_with, sampled_arguments
from tests.stack.backup import dump, restore
from tests.stack.processes import HOST, Stack, flows_under
from tests.stack.runs import CHECK, DEPLOYMENT, how_check_ended, how_it_ended, start_run, wait_for_end
from tests.stack.tiny import tiny_check_overrides, tiny_overrides, write_tiny_model

LIGHT = "reconcile/left-runs"
RUN_LIMIT_S = 220.0
SILENCE_S = 150.0
"""Three heartbeats, by which a flow counts as silent, and what the servers and the worker take to act on it."""
EVERY_FOURTH = 4


class Check:
    """The stack, its clients, and what held."""

    def __init__(self, stack: Stack, client: SyncPrefectClient, folder: Path) -> None:
        self.stack, self.client = stack, client
        self.storage, self.model = folder / "storage", folder / "model"
        self.mlflow = MlflowClient(f"http://{HOST}:{stack.ports['mlflow']}")
        self.failed: list[str] = []

    def say(self, what: str, *, held: bool) -> None:
        print(f"{'ok  ' if held else 'FAIL'} {what}", flush=True)
        if not held:
            self.failed.append(what)

    def overrides(self, epochs: int = 1) -> list[str]:
        if not self.model.exists():
            write_tiny_model(self.model)
        return tiny_overrides(self.model, self.storage, epochs=epochs)


def access(check: Check) -> None:
    prefect, mlflow = (f"http://{HOST}:{check.stack.ports[name]}" for name in ("prefect", "mlflow"))
    asked = f"{mlflow}/api/2.0/mlflow/experiments/get?experiment_id=0"
    for what, url in (("Prefect", f"{prefect}/api/admin/version"), ("MLflow", asked)):
        for who, auth in (("nobody", None), ("a wrong password", ("admin", "wrong"))):
            status = httpx.get(url, auth=auth).status_code
            check.say(f"{what} answers {status} to {who}", held=status == 401)
    status = httpx.get(f"{mlflow}/health", headers={"Host": "evil.example"}).status_code
    other = httpx.get(
        asked,
        headers={"Host": "evil.example"},
        auth=("admin", check.stack.secret("mlflow_admin_password")),
    ).status_code
    check.say(f"MLflow answers {other} to a request for another host (its health check: {status})", held=other == 403)


def run(check: Check) -> None:
    began = time.monotonic()
    with sampled_arguments(check.storage):
        flow_run = wait_for_end(check.client, start_run(check.client, "tiny", check.overrides()), RUN_LIMIT_S)
    ended = how_it_ended(flow_run, check.mlflow, check.storage)
    check.say(f"a run in {time.monotonic() - began:.0f} s: {ended}", held=ended.is_whole)
    # The stack's own secrets, which the run used: in its files, the servers' logs, MLflow's artifacts, PostgreSQL's files.
    secrets = {file.name: file.read_text().rpartition(":")[2] for file in check.stack.secrets.iterdir()}
    folders = [check.storage, check.stack.folder / "artifacts", check.stack.postgres_folder]
    logs = list(check.stack.folder.glob("*.log"))
    found = [
        f"{name} in {file}"
        for name, secret in secrets.items()
        for folder in folders
        for file in files_with(folder, secret)
    ]
    found += [
        f"{name} in {file}"
        for name, secret in secrets.items()
        for file in logs
        if secret in file.read_text(errors="replace")
    ]
    found += [f"{name} in arguments" for name, secret in secrets.items() if any(secret in seen for seen in ARGUMENTS)]
    check.say(
        f"of {len(secrets)} secrets none is in what was left or among {len(ARGUMENTS)} command lines: {found}",
        held=not found and bool(ARGUMENTS),
    )


def schedule(check: Check) -> None:
    deployment = check.client.read_deployment_by_name(LIGHT)
    # As in the image, from before the first run.
    (REPOSITORY / deployment.parameters["storage"]).mkdir(exist_ok=True)
    [made] = check.client.create_deployment_schedules(
        deployment.id, [(IntervalSchedule(interval=timedelta(minutes=1)), True)]
    )
    its_own = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment.id]))

    def begun() -> list[FlowRun]:
        found = check.client.read_flow_runs(flow_run_filter=its_own)
        return [run for run in found if run.auto_scheduled and not (run.state and run.state.is_scheduled())]

    wait_until(lambda: bool(begun()), f"a run of {LIGHT} by its schedule")
    ended = wait_for_end(check.client, begun()[0].id, RUN_LIMIT_S)
    check.client.delete_deployment_schedule(deployment.id, made.id)
    late_s = (ended.start_time - ended.expected_start_time).total_seconds()
    said = f"a run of its own accord, begun {late_s:.0f} s after its time: {ended.state_name}"
    check.say(said, held=ended.state_name == "Completed")
    # What a server fails to do by itself it tells nobody but its log.
    failed = [f.name for f in check.stack.folder.glob("*.log") if "Traceback" in f.read_text(errors="replace")]
    check.say(f"logs with a traceback: {failed or 'none'}", held=not failed)


def kill(check: Check) -> None:
    services = os.environ.get("SERVICES", "mlflow prefect postgres worker").split()
    for number, service in itertools.product(range(int(os.environ.get("REPEAT", "1"))), services):
        name = f"kill-{service}-{number:02}"
        began = start_run(check.client, name, check.overrides(epochs=4))
        marker = check.storage / "runs" / name / "jobs" / "train_adapter"
        wait_until(lambda marker=marker: any(marker.glob("*/metrics.jsonl")), f"{name}'s training")
        check.stack.kill(service)
        time.sleep(5)
        check.stack.start(service)
        check.stack.wait_for(service)
        ended = how_it_ended(wait_for_end(check.client, began, RUN_LIMIT_S), check.mlflow, check.storage)
        check.say(f"{name}: killed in training and restarted after 5 s: {ended}", held=ended.is_whole)


def silent(check: Check) -> None:
    deployment = check.client.read_deployment_by_name(LIGHT)
    looks_here = {**deployment.parameters, "storage": str(check.storage)}
    check.client.update_deployment(deployment.id, DeploymentUpdate(parameters=looks_here))
    began = start_run(check.client, "silent", check.overrides(epochs=4))
    jobs = check.storage / "runs" / "silent" / "jobs"
    wait_until(lambda: any((jobs / "train_adapter").glob("*/metrics.jsonl")), "silent's training")
    # The worker first: it would say that the flow crashed.
    check.stack.kill("worker")
    killed = [process for process in flows_under(check.stack.folder) if drives(process, began)]
    for process in killed:
        process.kill()
    check.stack.start("worker")
    check.stack.wait_for("worker")
    died = time.monotonic()
    ended = how_it_ended(wait_for_end(check.client, began, SILENCE_S + RUN_LIMIT_S), check.mlflow, check.storage)
    check.say(
        f"silent: {len(killed)} processes of the flow and its worker killed, {time.monotonic() - died:.0f} s later {ended}",
        held=bool(killed) and ended.is_whole,
    )
    its_own = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment.id]))
    started = [run for run in check.client.read_flow_runs(flow_run_filter=its_own) if run.created_by]
    by = {run.created_by.type for run in started}
    check.say(f"{LIGHT} was started by {by or 'nobody'}", held="AUTOMATION" in by)
    check.client.update_deployment(deployment.id, DeploymentUpdate(parameters=deployment.parameters))


def drives(process: psutil.Process, flow_run: UUID) -> bool:
    """Whether a process is a flow run's own; those of its jobs are not."""
    with suppress(psutil.Error):
        return "prefect" in " ".join(process.cmdline()) and process.environ().get("PREFECT__FLOW_RUN_ID") == str(
            flow_run
        )
    return False


def concurrent(check: Check) -> None:
    count = int(os.environ.get("RUNS", "20"))
    kinds = [CHECK if number % EVERY_FOURTH == EVERY_FOURTH - 1 else DEPLOYMENT for number in range(count)]
    overrides = {DEPLOYMENT: check.overrides(), CHECK: tiny_check_overrides(check.storage)}
    judge = {DEPLOYMENT: how_it_ended, CHECK: how_check_ended}
    began = time.monotonic()
    started = [start_run(check.client, f"many-{number:02}", overrides[kind], kind) for number, kind in enumerate(kinds)]
    whole = dict.fromkeys((DEPLOYMENT, CHECK), 0)
    for run_id, kind in zip(started, kinds, strict=True):
        flow_run = wait_for_end(check.client, run_id, max(600.0, 60.0 * count))
        ended = judge[kind](flow_run, check.mlflow, check.storage)
        whole[kind] += ended.is_whole
        if not ended.is_whole:
            print(f"     {flow_run.name}: {ended}", flush=True)
    told = ", ".join(f"{number} of {kinds.count(kind)} {kind}" for kind, number in whole.items())
    check.say(f"at once: {told} ended whole in {time.monotonic() - began:.0f} s", held=sum(whole.values()) == count)
    logs = "".join(file.read_text(errors="replace") for file in check.stack.folder.glob("*.log"))
    check.say("no log says 'database is locked'", held="database is locked" not in logs)


def backup(check: Check) -> None:
    if not (check.storage / "runs" / "tiny").exists():
        run(check)
    before = snapshot(check)
    folder = check.stack.folder / "backup"
    dump(check.stack, folder)
    for name in ("worker", "prefect", "mlflow"):
        check.stack.kill(name)
    restore(check.stack, folder)
    for name in ("prefect", "mlflow"):
        check.stack.start(name)
        check.stack.wait_for(name)
    after = snapshot(check)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    check.say(
        f"restored from {size:.1f} MB of dumps: {len(after)} figures of the old run are as before",
        held=is_as_before(before, after),
    )
    check.stack.start("worker")


def snapshot(check: Check) -> dict[str, object]:
    """What a person sees of the run `tiny`: its state in Prefect, and in MLflow every metric, parameter and artifact."""
    flow_run = next(f for f in check.client.read_flow_runs() if f.name == "tiny")
    seen: dict[str, object] = {"prefect": flow_run.state_name}
    experiment = check.mlflow.get_experiment_by_name("finetune")
    assert experiment is not None
    for found in check.mlflow.search_runs([experiment.experiment_id]):
        name = found.info.run_name
        seen |= {f"{name}/{key}": value for key, value in {**found.data.metrics, **found.data.params}.items()}
        seen[f"{name}/artifacts"] = sorted(entry.path for entry in check.mlflow.list_artifacts(found.info.run_id))
    return seen


def is_as_before(before: dict[str, object], after: dict[str, object]) -> bool:
    """Nothing lost: of a run without a metric, which are MLflow's only floats, there was nothing to lose."""
    return before == after and any(isinstance(value, float) for value in before.values())


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + RUN_LIMIT_S
    while not holds():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what} never came")
        time.sleep(0.2)


PARTS: dict[str, Callable[[Check], None]] = {
    "access": access,
    "run": run,
    "schedule": schedule,
    "kill": kill,
    "silent": silent,
    "concurrent": concurrent,
    "backup": backup,
}


@contextmanager
def clients(stack: Stack) -> Iterator[SyncPrefectClient]:
    environment = stack.environment()
    os.environ.update({name: environment[name] for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")})
    settings = {PREFECT_API_URL: environment["PREFECT_API_URL"], PREFECT_API_AUTH_STRING: stack.secret("prefect_auth")}
    with temporary_settings(settings), get_client(sync_client=True) as client:
        yield client


def main(names: list[str]) -> int:
    if unknown := set(names) - PARTS.keys() - {"start"}:
        print(f"error: no part {sorted(unknown)}; there are: start, {', '.join(PARTS)}", file=sys.stderr)
        return 2
    # Told to end by a time limit, it takes its servers with it.
    end_as_with_ctrl_c()
    folder = Path(tempfile.mkdtemp(prefix="proving-ground-stack-"))
    began = time.monotonic()
    with Stack(folder) as stack, clients(stack) as client:
        check = Check(stack, client, folder)
        took = time.monotonic() - began
        count = len(client.read_deployments())
        # Two minutes are wanted on a machine that has nothing else to do; how long it took is told, not judged.
        check.say(f"from nothing to both servers and {count} deployments in {took:.0f} s", held=count > 0)
        for name, part in PARTS.items():
            if name in names or not names:
                part(check)
    if check.failed:
        print(f"{len(check.failed)} failed; logs and runs are in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
