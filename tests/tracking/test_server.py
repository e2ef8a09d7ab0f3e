"""MLflow servers that cannot be used are told apart before a run begins, each with what to do."""

import http.server
import threading

import mlflow.version
import pytest

from tasks.hardware.host import free_port
from tasks.tracking import server
from tasks.tracking.mlflow_runs import Tracking
from tasks.tracking.server import TrackingUnavailable, check_mlflow

MAJOR, MINOR = mlflow.version.VERSION.split(".")[:2]


@pytest.fixture(autouse=True)
def asked_once(monkeypatch):
    monkeypatch.setattr(server, "RETRIES", 0)


@pytest.fixture
def answering():
    """A server that gives one answer to everything: ``answer[:] = [status, text]``; to its API another as ``answer[2:]``."""
    answer: list = []
    asked: list[tuple[str, str | None]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Authorization"]))
            status, text = answer[:2] if self.path == "/version" else answer[-2:]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield answer, asked, f"http://127.0.0.1:{listening.server_port}"
    listening.shutdown()
    listening.server_close()


@pytest.mark.parametrize("version", [f"{MAJOR}.{MINOR}.0", f"{MAJOR}.{MINOR}.99", f"{MAJOR}.{MINOR}.0.dev0"])
def test_a_server_of_this_minor_version_is_used(answering, version):
    answer, asked, uri = answering
    answer[:] = [200, version]
    assert check_mlflow(uri + "/") == version
    assert [path for path, _ in asked] == ["/version"]


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [
        (200, f"{MAJOR}.{int(MINOR) + 1}.0", f"is MLflow {MAJOR}.{int(MINOR) + 1}.0 and this environment has"),
        (200, f"{int(MAJOR) - 1}.{MINOR}.0", "upgrade the older of the two"),
        (401, "", "refuses the credentials; export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (403, "Invalid Host header", "add that to its MLFLOW_SERVER_ALLOWED_HOSTS"),
        (200, "<html>Jenkins</html>", "has another program taken the port"),
        (404, "<html>Not Found</html>", "Are its port and path right"),
        (404, '{"detail": "Not Found"}', "Are its port and path right"),
        (500, "Internal Server Error", "is its database away"),
    ],
)
def test_one_that_cannot_be_used_is_told_with_what_to_do(answering, status, text, said):
    answer, _, uri = answering
    answer[:] = [status, text]
    with pytest.raises(TrackingUnavailable, match=uri) as caught:
        check_mlflow(uri)
    assert said in str(caught.value)
    # Before anything of a run is made there.
    with pytest.raises(TrackingUnavailable):
        Tracking(uri).start_parent("run", {})


def test_nothing_listens():
    uri = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(TrackingUnavailable, match="does not answer") as caught:
        check_mlflow(uri)
    assert "make ui" in str(caught.value)


def test_the_password_is_sent_and_never_shown(answering, monkeypatch):
    answer, asked, uri = answering
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "planted-secret")
    answer[:] = [401, ""]
    with pytest.raises(TrackingUnavailable) as caught:
        check_mlflow(uri)
    assert asked[0][1].startswith("Basic ")
    assert "planted-secret" not in str(caught.value)


def test_a_store_without_a_server_is_taken_as_it_is(tmp_path):
    assert check_mlflow(f"sqlite:///{tmp_path}/mlflow.db") is None


@pytest.mark.parametrize(
    ("status", "text"),
    [(200, '{"experiment": {"experiment_id": "0"}}'), (404, '{"error_code": "RESOURCE_DOES_NOT_EXIST"}')],
)
def test_a_server_that_tells_no_version_is_taken_if_its_api_is_mlflows(answering, status, text):
    answer, _, uri = answering
    answer[:] = [404, "no", status, text]
    assert check_mlflow(uri) is None
