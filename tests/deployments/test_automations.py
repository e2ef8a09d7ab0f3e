"""Automations: on what they start, and how they are compared with the server's."""

import ast
import asyncio
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from uuid import uuid4

import pytest
from prefect.automations import Automation
from prefect.events.schemas.automations import EventTrigger, Posture, SequenceTrigger
from prefect.events.schemas.events import ResourceSpecification
from prefect.logging import disable_run_logger
from prefect.server.events.jinja_filters import all_filters
from prefect.server.events.schemas.automations import EventTrigger as ServerTrigger
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.server.utilities.user_templates import register_user_template_filters, render_user_template

from deployments.automations import BAD_ENDS, reconciling, shown, telling
from flows.cluster_check import end_state
from tasks import check_cluster
from tasks.contracts.cluster_report import Status
from tests.conftest import REPOSITORY


def test_equal_sets_are_shown_alike_in_whatever_order_they_were_filled():
    # So many that some of their hashes meet, whatever the seed: then a set is walked in the order of its filling.
    events = [f"prefect.flow-run.State{number}" for number in range(60)]
    forwards, backwards = set(events), set()
    backwards.update(reversed(events))
    assert forwards == backwards
    assert list(forwards) != list(backwards)
    assert shown(_sequence(forwards)) == shown(_sequence(backwards))
    assert shown(_sequence(forwards)) != shown(_sequence(forwards - {events[7]}))


def test_what_was_read_back_from_json_is_shown_as_before():
    for automation in telling(uuid4(), 30):
        again = Automation.model_validate_json(automation.model_dump_json())
        assert shown(again) == shown(automation)


def test_every_bad_end_of_a_flow_is_told():
    ends = {end_state(status, "").name for status in Status if not end_state(status, "").is_completed()}
    assert ends == {"CheckFail", "CheckError"}
    for file in sorted((REPOSITORY / "flows").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("Failed", "Crashed"):
                names = [word.value for word in node.keywords if word.arg == "name"]
                ends |= {name.value for name in names if isinstance(name, ast.Constant)} if names else {node.func.id}
    assert {"GatesFailed", "Crashed"} <= ends
    assert {f"prefect.flow-run.{name}" for name in ends} <= BAD_ENDS


@pytest.mark.parametrize(("before", "after"), [("PASS", "WARN"), ("PASS", "FAIL"), ("ERROR", "PASS")])
def test_a_changed_verdict_is_told_by_the_event_that_the_check_emits(monkeypatch, before, after):
    emitted = {}
    monkeypatch.setattr(check_cluster, "emit_event", lambda **values: emitted.update(values))
    report = SimpleNamespace(
        cluster="h100", status=Status(after), run="nightly-1", statement="3 gates say so.", suspects=[]
    )
    with disable_run_logger():
        check_cluster.tell_change(report, before)
    event = ReceivedEvent(id=uuid4(), occurred=datetime.now(UTC), received=datetime.now(UTC), **emitted)

    [telling_it] = [automation for automation in telling(uuid4(), 30) if covers(automation, event)]
    [action] = telling_it.actions
    register_user_template_filters(all_filters)
    said = [asyncio.run(render_user_template(text, {"event": event})) for text in (action.subject, action.body)]
    assert said == [f"cluster h100: {before} -> {after}", "3 gates say so.\ncheck nightly-1"]


@pytest.mark.parametrize(
    ("flow", "happened", "started"),
    [
        ("finetune", "prefect.flow-run.Crashed", {"reconcile: a run that crashed"}),
        ("cluster-check", "prefect.flow-run.Crashed", {"reconcile: a run that crashed"}),
        ("reconcile", "prefect.flow-run.Crashed", set()),
        ("cluster-check", "prefect.flow-run.Failed", set()),
    ],
)
def test_a_crash_of_a_run_or_a_check_starts_reconcile_and_nothing_else_does(flow, happened, started):
    event = of_flow_run(flow, happened)
    assert {automation.name for automation in reconciling(uuid4(), 30) if covers(automation, event)} == started


@pytest.mark.parametrize(("flow", "is_watched"), [("finetune", True), ("cluster-check", True), ("reconcile", False)])
def test_heartbeats_of_runs_and_checks_are_waited_for(flow, is_watched):
    beat = of_flow_run(flow, "prefect.flow-run.heartbeat")
    for automations in (reconciling(uuid4(), 30), telling(uuid4(), 30)):
        [silent] = [a for a in automations if a.trigger.posture == Posture.Proactive]
        trigger = ServerTrigger.model_validate(silent.trigger.model_dump(mode="json"))
        assert (trigger.covers(beat) and trigger.starts_after(beat.event)) is is_watched


@pytest.mark.parametrize("heartbeat_s", [30, 120, 300])
def test_a_run_counts_as_silent_after_three_of_its_own_heartbeats_for_both_who_look_and_who_are_told(heartbeat_s):
    automations = [*reconciling(uuid4(), heartbeat_s), *telling(uuid4(), heartbeat_s)]
    silent = {a.name: a.trigger.within for a in automations if a.trigger.posture == Posture.Proactive}
    wanted = timedelta(seconds=3 * heartbeat_s)
    assert silent == {
        "reconcile: a run whose heartbeats stay away": wanted,
        "tell: a run's heartbeats stay away": wanted,
    }


def of_flow_run(flow: str, happened: str) -> ReceivedEvent:
    """An event as Prefect emits it of a flow run."""
    related = {"prefect.resource.id": f"prefect.flow.{uuid4()}", "prefect.resource.role": "flow"}
    return ReceivedEvent(
        id=uuid4(),
        occurred=datetime.now(UTC),
        received=datetime.now(UTC),
        event=happened,
        resource={"prefect.resource.id": f"prefect.flow-run.{uuid4()}"},
        related=[related | {"prefect.resource.name": flow}],
    )


def covers(automation: Automation, event: ReceivedEvent) -> bool:
    """Whether the server would start the automation on that event."""
    trigger = ServerTrigger.model_validate(automation.trigger.model_dump(mode="json"))
    return trigger.covers(event) and trigger.expects(event.event) and trigger.posture == Posture.Reactive


def _sequence(events: set[str]) -> Automation:
    trigger = EventTrigger(
        posture=Posture.Reactive,
        expect=events,
        match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
        threshold=1,
    )
    return Automation(name="a sequence", trigger=SequenceTrigger(triggers=[trigger, trigger], within=60), actions=[])
