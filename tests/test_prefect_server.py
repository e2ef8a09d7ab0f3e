"""Servers that cannot be used are told apart, each with what to do."""

import http.server
import json
import socket
import threading

import mlflow.version
import prefect
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows import local_stack
from flows.local_stack import Addresses, StackError, configured_stack, running_stack
from flows.prefect_server import ServerProblem, check_server, server_address

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def answering():
    """A server that answers every path as it is told: ``answers[path] = (status, content type, body)``."""
    answers: dict[str, tuple[int, str, str]] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.removeprefix("/api")
            status, kind, body = answers.get(path, answers.get("*", (404, "text/plain", "no")))
            if callable(status):
                status = status(self.headers)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield answers, f"http://127.0.0.1:{server.server_port}/api"
    server.shutdown()
    server.server_close()


def problem_of(address: str, **settings) -> str:
    with (
        temporary_settings({PREFECT_API_URL: address, PREFECT_CLIENT_MAX_RETRIES: 0, **settings}),
        pytest.raises(ServerProblem) as caught,
        get_client(sync_client=True) as client,
    ):
        check_server(client)
    return str(caught.value)


def test_nothing_listens():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    said = problem_of(f"http://127.0.0.1:{port}/api")
    assert "does not answer" in said
    assert "make ui" in said


def test_another_program_has_the_port(answering):
    answers, address = answering
    answers["*"] = (200, "text/html", "<html>Jenkins</html>")
    assert "something answers there that is not Prefect" in problem_of(address)


def test_a_server_of_another_version_is_not_used(answering):
    answers, address = answering
    answers |= {"/health": (200, "application/json", "true"), "/admin/version": (200, "application/json", '"3.2.1"')}
    said = problem_of(address)
    assert "Prefect 3.2.1" in said
    assert "upgrade the older" in said


def test_wrong_credentials_are_told_and_never_shown(answering):
    answers, address = answering
    answers |= {"/health": (200, "application/json", "true"), "/admin/version": (401, "application/json", "{}")}
    said = problem_of(address)
    assert "refuses the credentials" in said
    with temporary_settings({PREFECT_API_AUTH_STRING: "admin:planted-secret"}):
        assert "planted-secret" not in problem_of(address)


def test_a_server_that_runs_without_its_database_is_told(answering):
    # Its health check and its version need none.
    answers, address = answering
    answers |= {
        "/health": (200, "application/json", "true"),
        "/admin/version": (200, "application/json", f'"{prefect.__version__}"'),
        "/ready": (503, "application/json", '{"message": "Database is not available"}'),
    }
    said = problem_of(address)
    assert "runs but cannot use its database (/ready: 503)" in said
    assert "is PostgreSQL up" in said


def test_a_server_that_fails_altogether_is_told(answering):
    answers, address = answering
    answers["*"] = (500, "application/json", json.dumps({"exception_message": "Internal Server Error"}))
    assert "HTTP 500" in problem_of(address)


def test_no_server_is_named():
    with temporary_settings(restore_defaults={PREFECT_API_URL}), pytest.raises(ServerProblem, match="names no server"):
        server_address()


GOOD_PREFECT = {
    "/health": (200, "application/json", "true"),
    "/admin/version": (200, "application/json", json.dumps(prefect.__version__)),
    "/ready": (200, "application/json", "{}"),
}
GOOD_MLFLOW = {"/version": (200, "text/plain", mlflow.version.VERSION)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"/admin/version": (401, "text/plain", "no")}, "refuses the credentials .* PREFECT_API_AUTH_STRING"),
        ({"/ready": (503, "text/plain", "no")}, "cannot use its database"),
        ({"/version": (200, "text/plain", "1.2.3")}, "MLflow 1.2.3 and this environment has"),
        ({"/version": (401, "text/plain", "no")}, "MLFLOW_TRACKING_USERNAME"),
    ],
)
def test_a_flow_begins_with_servers_that_it_can_use_or_not_at_all(answering, monkeypatch, changes, said):
    """Prefect and MLflow both answer a health check whatever else is wrong."""
    answers, address = answering
    answers.update(GOOD_PREFECT | GOOD_MLFLOW)
    monkeypatch.setenv("PREFECT_API_URL", address)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address.removesuffix("/api"))
    found = configured_stack()
    assert (found.prefect_api, found.mlflow) == (address, address.removesuffix("/api"))
    answers.update(changes)
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), pytest.raises(StackError, match=said):
        configured_stack()


def test_what_answers_in_the_place_of_make_uis_servers_is_used_if_it_is_them(answering, monkeypatch):
    answers, address = answering
    theirs = Addresses(address, address.removesuffix("/api"))
    monkeypatch.setattr(local_stack, "_addresses", lambda *ports: theirs)
    assert running_stack() is None
    answers.update(GOOD_PREFECT | GOOD_MLFLOW)
    assert running_stack() == theirs
    answers["/health"] = (200, "text/html", "hello")
    with pytest.raises(StackError, match="something answers there that is not Prefect"):
        running_stack()


def test_one_server_without_the_other_is_refused(monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(StackError, match="set both, or neither"):
        configured_stack()
    monkeypatch.delenv("PREFECT_API_URL")
    assert configured_stack() is None
