"""What ``make deploy`` says of telling people; what it does to a server is in tests/integration/test_deploy.py."""

from types import SimpleNamespace
from uuid import uuid4

import pytest

from deployments.automations import WEBHOOK_VARIABLE, telling
from deployments.deploy import _told


@pytest.mark.parametrize(
    ("known", "said"),
    [([], "nobody is told of failures"), (telling(uuid4(), 30), "automations that tell people stay as they are")],
)
def test_an_empty_webhook_is_none_and_automations_that_are_there_are_not_denied(monkeypatch, known, said):
    server = SimpleNamespace(read_automations=lambda: known)
    monkeypatch.setenv(WEBHOOK_VARIABLE, "")
    assert _told(server) == f"; {said}: {WEBHOOK_VARIABLE} is not set"
