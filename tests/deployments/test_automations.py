"""Automations as they are compared with the server's."""

from uuid import uuid4

from prefect.automations import Automation
from prefect.events.schemas.automations import EventTrigger, Posture, SequenceTrigger
from prefect.events.schemas.events import ResourceSpecification

from deployments.automations import shown, telling


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
    for automation in telling(uuid4()):
        again = Automation.model_validate_json(automation.model_dump_json())
        assert shown(again) == shown(automation)


def _sequence(events: set[str]) -> Automation:
    trigger = EventTrigger(
        posture=Posture.Reactive,
        expect=events,
        match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
        threshold=1,
    )
    return Automation(name="a sequence", trigger=SequenceTrigger(triggers=[trigger, trigger], within=60), actions=[])
