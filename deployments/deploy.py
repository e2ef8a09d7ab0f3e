"""Make a Prefect server know everything of this project: work pools, deployments, limits, schedules, automations.

    python -m deployments.deploy --dry-run                    what would change on the server that PREFECT_API_URL names
    python -m deployments.deploy                              change it; a second time changes nothing
    python -m deployments.deploy --site infra/slurm/site.yaml     with a customer's partition, folders and schedules

With PROVING_GROUND_WEBHOOK in the environment people are told of failed runs and changed verdicts there. Exit status: 0 done,
1 the server cannot be used, 2 a deployment or the site's file says what cannot be used.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from prefect.automations import Automation
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import ConcurrencyOptions
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound

from deployments.automations import (
    EARLIER_FORMS,
    RECONCILE,
    WEBHOOK_BLOCK,
    WEBHOOK_VARIABLE,
    block_id,
    reconciling,
    saved_webhook,
    shown,
    telling,
    webhook_block,
)
from deployments.declared import Declared, Site, read_declared, read_site
from deployments.work_pools import WorkPool, work_pools
from flows.prefect_server import ServerProblem, check_server, server_address
from tasks.contracts.overrides import SettingsError, dotted
from tasks.tracking.server import TrackingUnavailable, check_mlflow

DONE, NO_SERVER, BAD_PARAMETERS = 0, 1, 2
FORM = "parameter_openapi_schema"
LONG = 60
"""Characters of a value in a difference; the parameters' schema is a hundred thousand."""


@dataclass(frozen=True)
class Change:
    """One thing on the server that is not as declared."""

    what: str
    before: Mapping[str, Any] | None
    after: Mapping[str, Any]
    make: Callable[[], object]

    def __str__(self) -> str:
        if self.before is None:
            return f"+ {self.what}"
        before, after = dotted(_numbered(self.before)), dotted(_numbered(self.after))
        differing = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
        # Of the form, which follows from the code, a line a field would hide what somebody decided.
        of_form = sum(name.startswith(FORM) for name in differing)
        lines = [f"    the form: {of_form} entries changed with the code's settings"] if of_form else []
        lines += [
            f"    {name}: {_short(before.get(name))} -> {_short(after.get(name))}"
            for name in differing
            if not name.startswith(FORM)
        ]
        return "\n".join([f"~ {self.what}", *lines])


def _numbered(value: Any) -> Any:
    """The same with mappings by number for lists of mappings, so that each of their fields has a line of its own."""
    if isinstance(value, Mapping):
        return {key: _numbered(item) for key, item in value.items()}
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return {str(number): _numbered(item) for number, item in enumerate(value)}
    return value


def changes(client: SyncPrefectClient, declared: list[Declared], site: Site) -> Iterator[Change]:
    """What is to be done, those first that others refer to."""
    for pool in work_pools():
        yield from _work_pool(client, pool)
    for deployment in declared:
        yield from _deployment(client, deployment, site)
    yield from _automations(client, site)


def undeclared(client: SyncPrefectClient, declared: list[Declared]) -> list[str]:
    """Deployments of our flows on the server that no file declares."""
    ours, names = {d.flow for d in declared}, {d.full_name for d in declared}
    flows = {flow.id: flow.name for flow in client.read_flows() if flow.name in ours}
    found = [f"{flows[d.flow_id]}/{d.name}" for d in client.read_deployments() if d.flow_id in flows]
    return sorted(set(found) - names)


def undeclared_automations(client: SyncPrefectClient) -> list[tuple[str, UUID]]:
    """Names and ids of automations on the server that are named as ours are, and that no file declares any more."""
    any_s = Site().heartbeat_s
    ours = [*reconciling(uuid4(), any_s), *telling(uuid4(), any_s)]
    names = {automation.name for automation in ours}
    forms = (*{f"{name.partition(':')[0]}: " for name in names}, *EARLIER_FORMS)
    return [(a.name, a.id) for a in client.read_automations() if a.name.startswith(forms) and a.name not in names]


def _work_pool(client: SyncPrefectClient, pool: WorkPool) -> Iterator[Change]:
    after = {
        "description": pool.description,
        "concurrency_limit": pool.concurrency_limit,
        "base_job_template": pool.base_job_template,
    }
    try:
        known = client.read_work_pool(pool.name)
    except ObjectNotFound:
        new = WorkPoolCreate(name=pool.name, type=pool.type, **after)  # type: ignore[arg-type]
        yield Change(f"work pool {pool.name} ({pool.type})", None, after, lambda: client.create_work_pool(new))
        return
    if known.type != pool.type:
        raise ServerProblem(
            f"work pool {pool.name} is of type {known.type} on the server and must be {pool.type}, which cannot be changed: "
            f"remove it (prefect work-pool delete {pool.name}), and 'make deploy' makes it anew"
        )
    before = {name: getattr(known, name) for name in after}
    if before != after:
        update = WorkPoolUpdate(**after)  # type: ignore[arg-type]
        yield Change(f"work pool {pool.name}", before, after, lambda: client.update_work_pool(pool.name, update))


def _deployment(client: SyncPrefectClient, deployment: Declared, site: Site) -> Iterator[Change]:
    what = f"deployment {deployment.full_name}"
    try:
        known = client.read_deployment_by_name(deployment.full_name)
    except ObjectNotFound:
        yield Change(what, None, deployment.fields, lambda: _register(client, deployment))
        return
    before = _as_known(known)
    if deployment.full_name not in site.active_schedules:
        schedules = as_switched(deployment.fields["schedules"], before["schedules"])
        deployment = replace(deployment, fields={**deployment.fields, "schedules": schedules})
    if before != deployment.fields:
        yield Change(what, before, deployment.fields, lambda: _register(client, deployment))


def as_switched(wanted: list[dict[str, Any]], known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Schedules that no site names stay as a person switched them on the server."""
    is_active = {(entry["cron"], entry["timezone"]): entry["active"] for entry in known}
    return [{**entry, "active": is_active.get((entry["cron"], entry["timezone"]), entry["active"])} for entry in wanted]


def _as_known(known: DeploymentResponse) -> dict[str, Any]:
    """A deployment of the server by the names that :class:`Declared` uses."""
    limit, options = known.global_concurrency_limit, known.concurrency_options
    return {
        "description": known.description,
        "tags": sorted(known.tags),
        "entrypoint": known.entrypoint,
        "work_pool_name": known.work_pool_name,
        "job_variables": known.job_variables,
        "parameters": known.parameters,
        "schedules": [
            {
                "cron": getattr(entry.schedule, "cron", str(entry.schedule)),
                "timezone": getattr(entry.schedule, "timezone", None),
                "active": entry.active,
            }
            for entry in known.schedules
        ],
        "concurrency_limit": limit.limit if limit else None,
        "collision_strategy": options.collision_strategy.value if limit and options else None,
        "pull_steps": known.pull_steps,
        "parameter_openapi_schema": known.parameter_openapi_schema,
    }


def _register(client: SyncPrefectClient, deployment: Declared) -> None:
    fields = dict(deployment.fields)
    strategy = fields.pop("collision_strategy")
    schedules = [
        DeploymentScheduleCreate(
            schedule=CronSchedule(cron=entry["cron"], timezone=entry["timezone"]), active=entry["active"]
        )
        for entry in fields.pop("schedules")
    ]
    client.create_deployment(
        flow_id=client.create_flow_from_name(deployment.flow),
        name=deployment.name,
        schedules=schedules,
        concurrency_options=None if strategy is None else ConcurrencyOptions(collision_strategy=strategy),
        enforce_parameter_schema=True,
        **fields,
    )


def _automations(client: SyncPrefectClient, site: Site) -> Iterator[Change]:
    try:
        reconcile_id = client.read_deployment_by_name(RECONCILE).id
    except ObjectNotFound:
        # Of a dry run against a new server: what it would refer to is not there yet.
        yield Change(f"automations with {RECONCILE}", None, {}, lambda: None)
        return
    wanted = reconciling(reconcile_id, site.heartbeat_s)
    if address := os.environ.get(WEBHOOK_VARIABLE):
        yield from _webhook(address)
        # In a dry run it is not there yet, and what would refer to it cannot be compared.
        saved = saved_webhook()
        if saved is not None:
            wanted += telling(block_id(saved), site.heartbeat_s)
    for automation in wanted:
        yield from _automation(automation)


def _webhook(address: str) -> Iterator[Change]:
    what = f"block {WEBHOOK_BLOCK} (where people are told)"
    block, saved = webhook_block(address), saved_webhook()
    if saved is None:
        yield Change(what, None, {}, lambda: block.save(WEBHOOK_BLOCK))
    elif saved.secrets != block.secrets:
        before, after = {"address": "a secret"}, {"address": "another secret"}
        yield Change(what, before, after, lambda: block.save(WEBHOOK_BLOCK, overwrite=True))


def _automation(automation: Automation) -> Iterator[Change]:
    what = f"automation {automation.name!r}"
    try:
        known: Any = Automation.read(name=automation.name)
    except ValueError:
        yield Change(what, None, shown(automation), automation.create)
        return
    before, after = shown(known), shown(automation)
    if before != after:

        def renew() -> None:
            for name in ("trigger", "actions", "description", "enabled"):
                setattr(known, name, getattr(automation, name))
            known.update()

        yield Change(what, before, after, renew)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONG else f"{text[: LONG - 4]} ..."


def deploy(site: Site, *, is_dry_run: bool) -> int:
    """Print every difference and, unless it is a dry run, remove it.

    Returns:
        How many there were.

    Raises:
        SettingsError: parameters of a deployment do not fit the code, or Prefect would not take what it says.
        ServerProblem: the server cannot be used.
        TrackingUnavailable: the MLflow that MLFLOW_TRACKING_URI names cannot be used; runs here would find out one by one.
    """
    declared = read_declared(site)
    server_address()
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        check_mlflow(uri)
    with get_client(sync_client=True) as client:
        version = check_server(client)
        print(f"Prefect {version} at {client.api_url}")
        count = converge(lambda: changes(client, declared, site), is_dry_run=is_dry_run)
        for name in undeclared(client, declared):
            print(f"? deployment {name} is on the server and in no file; left alone (prefect deployment delete {name})")
        for name, number in undeclared_automations(client):
            print(
                f"? automation {name!r} is on the server and in no file; left alone (prefect automation delete --id {number})"
            )
        told = _told(client)
    print(f"{count} {'to change' if is_dry_run else 'changed'}, {len(declared)} deployments{told}")
    return count


def converge(differences: Callable[[], Iterable[Change]], *, is_dry_run: bool) -> int:
    """Print all differences, then remove them; what refers to something that was not there yet shows in the next round.

    Returns:
        How many were printed.

    Raises:
        ServerProblem: what was removed is there again.
    """
    count, before = 0, ""
    while pending := list(differences()):
        now = "\n".join(map(str, pending))
        if now == before:
            raise ServerProblem(
                f"changed, and still other than declared; does somebody else deploy at the same time?\n{now}"
            )
        print(now, flush=True)
        count += len(pending)
        if is_dry_run:
            break
        for change in pending:
            change.make()
        before = now
    return count


def _told(client: SyncPrefectClient) -> str:
    """What becomes of telling people without a webhook; an empty one, as CI has of a secret that is not set, is none."""
    if os.environ.get(WEBHOOK_VARIABLE):
        return ""
    known = (telling(uuid4(), Site().heartbeat_s), client.read_automations())
    ours, there = ({automation.name for automation in found} for found in known)
    what = "nobody is told of failures" if ours.isdisjoint(there) else "automations that tell people stay as they are"
    return f"; {what}: {WEBHOOK_VARIABLE} is not set"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deployments.deploy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--site", type=Path, help="YAML file with what differs there (default: this machine)")
    parser.add_argument("--dry-run", action="store_true", help="only print what would change")
    arguments = parser.parse_args()
    try:
        deploy(read_site(arguments.site), is_dry_run=arguments.dry_run)
    except SettingsError as error:
        lines = "\n".join(f"  {line}" for line in str(error).splitlines())
        print(f"error: these deployments cannot be used:\n{lines}", file=sys.stderr)
        return BAD_PARAMETERS
    except (ServerProblem, TrackingUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return NO_SERVER
    return DONE


if __name__ == "__main__":
    sys.exit(main())
