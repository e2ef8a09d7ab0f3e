"""Automations of the Prefect server that PREFECT_API_URL names: ``python deployments/automations.py`` makes or renews them.

A flow that is killed hard leaves its job behind. Its worker, if that still lives, says that it crashed; without one the run
stays "Running". Flow runs of deployments send heartbeats (PREFECT_FLOWS_HEARTBEAT_FREQUENCY, in seconds). After a crash, and
where heartbeats stay away, ``reconcile`` takes the run over or ends it.
"""

from datetime import timedelta
from uuid import UUID

from prefect.automations import Automation
from prefect.client.orchestration import get_client
from prefect.events.actions import RunDeployment
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.settings import get_current_settings

from tasks.lease import STALE_AFTER_S

RECONCILE = "reconcile/left-runs"
MISSED_HEARTBEATS = 3
AFTER_CRASH = timedelta(seconds=STALE_AFTER_S + 30)
"""Until a lease on another machine has run out; a person may retry the run before."""
OUR_RUNS = ResourceSpecification({"prefect.resource.role": "flow", "prefect.resource.name": "finetune"})


def automations(reconcile_id: UUID, heartbeat_s: int) -> list[Automation]:
    """Both, each with the deployment of that id as its action."""
    any_run = ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"})
    silent = EventTrigger(
        posture=Posture.Proactive,
        after={"prefect.flow-run.heartbeat"},
        # Any other event of the run is a sign of life too; ends have names of ours among them (GatesFailed).
        expect={"prefect.flow-run.*"},
        match=any_run,
        match_related=OUR_RUNS,
        for_each={"prefect.resource.id"},
        threshold=1,
        within=timedelta(seconds=MISSED_HEARTBEATS * heartbeat_s),
    )
    crashed = EventTrigger(
        posture=Posture.Reactive,
        expect={"prefect.flow-run.Crashed"},
        match=any_run,
        match_related=OUR_RUNS,
        for_each={"prefect.resource.id"},
        threshold=1,
    )
    return [
        Automation(
            name="finetune: reconcile a run whose heartbeats stay away",
            description="Its process and its worker are gone: another takes over the running job, or ends it and says so.",
            trigger=silent,
            actions=[RunDeployment(source="selected", deployment_id=reconcile_id)],
        ),
        Automation(
            name="finetune: reconcile a run that crashed",
            description="Its job may still run: unless somebody retries the run before, another takes it over.",
            trigger=crashed,
            actions=[RunDeployment(source="selected", deployment_id=reconcile_id, schedule_after=AFTER_CRASH)],
        ),
    ]


def main() -> None:
    """Make the automations, or renew those of the same name."""
    with get_client(sync_client=True) as client:
        reconcile_id = client.read_deployment_by_name(RECONCILE).id
    heartbeat_s = get_current_settings().flows.heartbeat_frequency
    if heartbeat_s is None:
        raise SystemExit("PREFECT_FLOWS_HEARTBEAT_FREQUENCY is off: without heartbeats nothing tells a killed flow run")
    for automation in automations(reconcile_id, heartbeat_s):
        try:
            known = Automation.read(name=automation.name)
        except ValueError:
            automation.create()
            continue
        known.trigger, known.actions, known.description = automation.trigger, automation.actions, automation.description
        known.update()


if __name__ == "__main__":
    main()
