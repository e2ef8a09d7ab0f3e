"""``make deploy`` against a real Prefect server: twice the same, a change undone, nothing written by a dry run."""

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId, LogFilter, LogFilterFlowRunId
from prefect.events.schemas.automations import AutomationCore
from prefect.events.schemas.events import Event
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Failed

from deployments.automations import WEBHOOK_VARIABLE
from deployments.declared import Site
from deployments.deploy import deploy
from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def client(stack):
    with temporary_settings({PREFECT_API_URL: stack.prefect_api}), get_client(sync_client=True) as client:
        yield client


def test_deploy_makes_everything_once_and_puts_back_what_was_changed(client, monkeypatch, capsys):
    secret = "https://hooks.example/planted-webhook-token"
    before = client.read_deployments()
    assert deploy(Site(), is_dry_run=True) > 0
    assert client.read_deployments() == before

    monkeypatch.setenv(WEBHOOK_VARIABLE, secret)
    assert deploy(Site(), is_dry_run=False) > 0
    assert deploy(Site(), is_dry_run=False) == 0

    known = client.read_deployment_by_name("finetune/poc")
    assert known.global_concurrency_limit.limit == 1
    client.update_deployment(known.id, DeploymentUpdate(description="changed by hand", tags=["gpu"]))
    capsys.readouterr()
    assert deploy(Site(), is_dry_run=True) == 1
    assert "description: 'changed by hand' -> " in capsys.readouterr().out
    assert client.read_deployment_by_name("finetune/poc").description == "changed by hand"
    assert deploy(Site(), is_dry_run=False) == 1
    assert client.read_deployment_by_name("finetune/poc").description != "changed by hand"

    monkeypatch.setenv(WEBHOOK_VARIABLE, secret + "-another")
    assert deploy(Site(), is_dry_run=False) == 1
    said = capsys.readouterr().out
    assert "planted-webhook-token" not in said
    assert "? automation" not in said

    # One that an older checkout made under a name that is no longer ours would tell people twice.
    [left] = [known for known in client.read_automations() if known.name == "tell: a run failed"]
    client.create_automation(AutomationCore.model_validate(left.model_dump() | {"name": "tell: the cluster is fine"}))
    earlier = "finetune: reconcile a run that crashed"
    client.create_automation(AutomationCore.model_validate(left.model_dump() | {"name": earlier}))
    assert deploy(Site(), is_dry_run=True) == 0
    said = capsys.readouterr().out
    assert "? automation 'tell: the cluster is fine' is on the server and in no file" in said
    assert f"? automation {earlier!r} is on the server and in no file" in said


def test_a_site_changes_the_deployments_that_have_the_gpus(client, capsys):
    deploy(Site(), is_dry_run=False)
    site = Site(overrides=("pool.backend=slurm",), active_schedules=("finetune/scheduled",))
    capsys.readouterr()
    deploy(site, is_dry_run=False)
    said = capsys.readouterr().out
    assert "~ deployment finetune/poc\n    parameters.experiment.pool.backend: 'local' -> 'slurm'" in said
    assert "deployment finetune/demo" not in said
    assert [s.active for s in client.read_deployment_by_name("finetune/scheduled").schedules] == [True]
    assert deploy(site, is_dry_run=False) == 0

    # One that a person switched on, and no site names, is left as it is.
    nightly = client.read_deployment_by_name("cluster-check/nightly")
    client.update_deployment_schedule(nightly.id, nightly.schedules[0].id, active=True)
    assert deploy(site, is_dry_run=False) == 0
    assert [s.active for s in client.read_deployment_by_name("cluster-check/nightly").schedules] == [True]


def test_a_schedule_that_is_on_has_runs_waiting_for_their_time(client, storage):
    """With SQLAlchemy 2.1 Prefect 3.8 writes none, says so in the server's log alone, and nothing ever runs."""
    deploy(Site(active_schedules=("cluster-check/nightly",)), is_dry_run=False)
    nightly = client.read_deployment_by_name("cluster-check/nightly")
    its_own = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[nightly.id]))
    deadline = time.monotonic() + 120
    while not (waiting := client.read_flow_runs(flow_run_filter=its_own)):
        assert time.monotonic() < deadline, (storage / "servers" / "prefect.log").read_text()[-2000:]
        time.sleep(1)
    assert all(run.state.is_scheduled() and run.auto_scheduled for run in waiting)
    assert {(run.expected_start_time.hour, run.expected_start_time.minute) for run in waiting} == {(3, 30)}
    assert "Traceback" not in (storage / "servers" / "prefect.log").read_text()


@pytest.fixture
def hook():
    """The address of a webhook, and what was posted to it."""
    posted = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self):
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/planted-path", posted
    server.shutdown()
    server.server_close()


def test_people_are_told_of_a_failed_run_and_of_a_changed_verdict(client, stack, monkeypatch, hook):
    address, posted = hook
    monkeypatch.setenv(WEBHOOK_VARIABLE, address)
    deploy(Site(), is_dry_run=False)
    run = client.create_flow_run_from_deployment(client.read_deployment_by_name("finetune/demo").id, name="unlucky")
    payload = {"before": "PASS", "after": "FAIL", "statement": "node1 is slow", "run": "nightly-7"}

    def happen():
        # The server learns of new automations after a moment, and tells nothing of what happened before.
        client.set_flow_run_state(run.id, Failed(message="its disk is full"), force=True)
        changed = Event(
            event="cluster-check.verdict-changed",
            resource={"prefect.resource.id": "proving-ground.cluster.ours", "prefect.resource.name": "ours"},
            payload=payload,
        )
        httpx.post(f"{stack.prefect_api}/events", json=[changed.model_dump(mode="json")]).raise_for_status()

    wanted = (
        "finetune Failed: unlucky\nits disk is full",
        "cluster ours: PASS -> FAIL\nnode1 is slow\ncheck nightly-7",
    )
    deadline = time.monotonic() + 60
    while not all(any(text.startswith(start) for text in posted) for start in wanted):
        assert time.monotonic() < deadline, posted
        happen()
        time.sleep(3)


@pytest.mark.parametrize(("name", "group"), [("finetune/demo", "experiment"), ("cluster-check/demo", "check")])
def test_a_deployment_whose_values_no_longer_fit_the_code_fails_at_once_with_the_setting_and_the_next_step(
    client, stack, name, group
):
    deploy(Site(), is_dry_run=False)
    known = client.read_deployment_by_name(name)
    # As code from before would have left it: the server itself does not look at what a schedule starts.
    values = known.parameters | {group: known.parameters[group] | {"colour": "blue"}}
    client.update_deployment(known.id, DeploymentUpdate(parameters=values, enforce_parameter_schema=False))
    flow_run = client.create_flow_run_from_deployment(known.id)
    subprocess.run(
        [sys.executable, "-m", "prefect", "flow-run", "execute", str(flow_run.id)],
        cwd=REPOSITORY,
        env=os.environ | stack.environment(),
        capture_output=True,
    )
    ended = client.read_flow_run(flow_run.id)
    assert ended.state.is_failed()
    assert f"{group}.colour: Extra inputs are not permitted" in ended.state.message
    only = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run.id]))
    deadline = time.monotonic() + 30
    while not (told := [log.message for log in client.read_logs(only) if "make deploy DRY_RUN=1" in log.message]):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert f"{group}.colour" in told[0]

    assert deploy(Site(), is_dry_run=False) == 1
    assert client.read_deployment_by_name(name).parameters == known.parameters
