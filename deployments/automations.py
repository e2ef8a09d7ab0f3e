"""What the Prefect server does by itself: takes over runs that were left, and tells people what they must know.

A flow that is killed hard leaves its job behind. Its worker, if that still lives, says that it crashed; without one the run
stays "Running". Flow runs of deployments send heartbeats, as often as the site says (``heartbeat_s``). After a crash, and
where heartbeats stay away, ``reconcile`` takes the run over or ends it.

People are told through one webhook (Slack, Mattermost, or whatever takes ``{"text": ...}``), whose address is a secret: it
comes from the environment variable PROVING_GROUND_WEBHOOK and lies in a Prefect block.
"""

from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect.automations import Automation
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.events.actions import RunDeployment, SendNotification
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from pydantic_core import to_jsonable_python

from tasks.contracts.cluster_report import BAD_END_STATES
from tasks.lease import STALE_AFTER_S

RECONCILE = "reconcile/left-runs"
WEBHOOK_VARIABLE = "PROVING_GROUND_WEBHOOK"
WEBHOOK_BLOCK = "proving-ground"
MISSED_HEARTBEATS = 3
EARLIER_FORMS = ("finetune: ",)
"""How names of ours began before; one that is left on a server does its work twice."""
AFTER_CRASH = timedelta(seconds=STALE_AFTER_S + 30)
"""Until a lease on another machine has run out; a person may retry the run before."""
ANY_RUN = ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"})
OUR_RUNS = ResourceSpecification(
    {"prefect.resource.role": "flow", "prefect.resource.name": ["finetune", "cluster-check"]}
)
CLUSTERS = ResourceSpecification({"prefect.resource.id": "proving-ground.cluster.*"})
BAD_ENDS = {
    f"prefect.flow-run.{state}" for state in ("Failed", "TimedOut", "Crashed", "GatesFailed", *BAD_END_STATES.values())
}
"""By the states' names, which are what Prefect's events are called by; ours among them."""


def reconciling(reconcile_id: UUID, heartbeat_s: float) -> list[Automation]:
    """Of runs that were left, each with the deployment of that id as its action."""
    crashed = _on({"prefect.flow-run.Crashed"}, OUR_RUNS)
    run = RunDeployment(
        source="selected", deployment_id=reconcile_id, schedule_after=AFTER_CRASH, parameters=None, job_variables=None
    )
    return [
        Automation(
            name="reconcile: a run whose heartbeats stay away",
            description="Its process and its worker are gone: another takes over its running job, or ends it and says so.",
            trigger=_silent(heartbeat_s),
            # It fires once, and not before the lease of a machine that died has run out.
            actions=[run],
        ),
        Automation(
            name="reconcile: a run that crashed",
            description="Its job may still run: unless somebody retries the run before, another takes it over or ends it.",
            trigger=crashed,
            actions=[run],
        ),
    ]


def telling(webhook_id: UUID, heartbeat_s: float) -> list[Automation]:
    """What people are told, through the block of that id."""
    tell = SendNotification(
        block_document_id=webhook_id,
        subject="{{ flow.name }} {{ flow_run.state.name }}: {{ flow_run.name }}",
        body="{{ flow_run.state.message }}\n{{ flow_run|ui_url }}",
    )
    return [
        Automation(
            name="tell: a run failed",
            description="A fine-tuning run or a cluster check ended with an error or without meeting its gates.",
            trigger=_on(BAD_ENDS, OUR_RUNS),
            actions=[tell],
        ),
        Automation(
            name="tell: a cluster's verdict changed",
            description="A cluster check came to another verdict than the one before it, for the better or the worse.",
            # The check's own event: a flow run's end does not tell PASS from WARN.
            trigger=EventTrigger(
                posture=Posture.Reactive,
                expect={"cluster-check.verdict-changed"},
                match=CLUSTERS,
                for_each={"prefect.resource.id"},
                threshold=1,
            ),
            actions=[
                SendNotification(
                    block_document_id=webhook_id,
                    subject="cluster {{ event.resource.name }}: {{ event.payload.before }} -> {{ event.payload.after }}",
                    body="{{ event.payload.statement }}\ncheck {{ event.payload.run }}",
                )
            ],
        ),
        Automation(
            name="tell: a run's heartbeats stay away",
            description="Nobody drives it, or its machine cannot reach the server; reconcile is about to look at it.",
            # As reconcile's own: a time that is not the site's would tell of every run whose heartbeats are further apart.
            trigger=_silent(heartbeat_s),
            actions=[tell],
        ),
    ]


def webhook_block(address: str) -> CustomWebhookNotificationBlock:
    """The block that posts to ``address``, which is kept among its secrets."""
    return CustomWebhookNotificationBlock.model_validate(
        {
            "name": "Proving Ground",
            "url": "{{address}}",
            "json_data": {"text": "{{subject}}\n{{body}}"},
            "secrets": {"address": address},
        }
    )


def saved_webhook() -> CustomWebhookNotificationBlock | None:
    """The server's block, with its secret; None: it has none."""
    try:
        block: Any = CustomWebhookNotificationBlock.load(WEBHOOK_BLOCK)
    except ValueError:
        return None
    saved: CustomWebhookNotificationBlock = block
    return saved


def block_id(block: CustomWebhookNotificationBlock) -> UUID:
    """Of a block that was saved."""
    saved_as = block._block_document_id
    assert saved_as is not None
    return saved_as


def shown(automation: Automation) -> dict[str, object]:
    """What of an automation counts when it is compared with another."""
    values = automation.model_dump(include={"description", "enabled", "trigger", "actions"})
    ordered: dict[str, object] = to_jsonable_python(_without_sets(values))
    return ordered


def _without_sets(value: Any) -> Any:
    """The same with sorted lists for its sets: two equal sets may have two orders, by the way in which each was filled."""
    if isinstance(value, dict):
        return {key: _without_sets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_sets(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value


def _silent(heartbeat_s: float) -> EventTrigger:
    """A run of which nothing was heard for several times as long as its heartbeats are apart."""
    return EventTrigger(
        posture=Posture.Proactive,
        after={"prefect.flow-run.heartbeat"},
        # Any other event of the run is a sign of life too; ends have names of ours among them (GatesFailed).
        expect={"prefect.flow-run.*"},
        match=ANY_RUN,
        match_related=OUR_RUNS,
        for_each={"prefect.resource.id"},
        threshold=1,
        within=timedelta(seconds=MISSED_HEARTBEATS * heartbeat_s),
    )


def _on(events: set[str], flows: ResourceSpecification) -> EventTrigger:
    return EventTrigger(
        posture=Posture.Reactive,
        expect=events,
        match=ANY_RUN,
        match_related=flows,
        for_each={"prefect.resource.id"},
        threshold=1,
    )
