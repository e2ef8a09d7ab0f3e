"""Automations of the Prefect server that PREFECT_API_URL names: ``python deployments/automations.py`` makes or renews them.

A flow that is killed hard stays "Running" in Prefect. Flow runs of deployments send heartbeats
(PREFECT_FLOWS_HEARTBEAT_FREQUENCY, in seconds); where they stay away, ``reconcile`` takes the run over or ends it.
"""

from datetime import timedelta
from uuid import UUID

from prefect.automations import Automation
from prefect.client.orchestration import get_client
from prefect.events.actions import RunDeployment
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.settings import get_current_settings

RECONCILE = "reconcile/left-runs"
LEFT_RUNS = "finetune: reconcile a run whose heartbeats stay away"
MISSED_HEARTBEATS = 3


def left_runs(reconcile_id: UUID, heartbeat_s: int) -> Automation:
    """Starts ``reconcile`` when a flow run neither sends heartbeats nor reaches another state."""
    return Automation(
        name=LEFT_RUNS,
        description="Its process was killed: another takes over the running job, or ends it and says so.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={"prefect.flow-run.heartbeat"},
            # Any other event of the run is a sign of life too; ends have names of ours among them (GatesFailed).
            expect={"prefect.flow-run.*"},
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            for_each={"prefect.resource.id"},
            threshold=1,
            within=timedelta(seconds=MISSED_HEARTBEATS * heartbeat_s),
        ),
        actions=[RunDeployment(source="selected", deployment_id=reconcile_id)],
    )


def main() -> None:
    """Make the automations, or renew those of the same name."""
    with get_client(sync_client=True) as client:
        reconcile_id = client.read_deployment_by_name(RECONCILE).id
    heartbeat_s = get_current_settings().flows.heartbeat_frequency
    if heartbeat_s is None:
        raise SystemExit("PREFECT_FLOWS_HEARTBEAT_FREQUENCY is off: without heartbeats nothing tells a killed flow run")
    automation = left_runs(reconcile_id, heartbeat_s)
    try:
        known = Automation.read(name=LEFT_RUNS)
    except ValueError:
        automation.create()
        return
    known.trigger, known.actions, known.description = automation.trigger, automation.actions, automation.description
    known.update()


if __name__ == "__main__":
    main()
