"""Whether the MLflow server that a run is recorded in can be used, and if not, why and what to do."""

import re
from urllib.parse import urlparse

import mlflow.version
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from requests import Response
from requests.exceptions import RequestException

EXPERIMENT = "/api/2.0/mlflow/experiments/get?experiment_id=0"
"""What every MLflow answers in its own way, a cloud's and one without that experiment too."""
RETRIES = 3
"""About a quarter of a minute: a server that is being restarted is waited for, one that is not there is told."""


class TrackingUnavailable(RuntimeError):
    """MLflow cannot be reached, refuses us, or is of another version."""


def check_mlflow(uri: str) -> str | None:
    """The server's version; None: a store without a server, or one (a cloud's) that tells none.

    Raises:
        TrackingUnavailable: it does not answer, is no MLflow, refuses the credentials or the address, or is of another version.
    """
    if urlparse(uri).scheme not in ("http", "https"):
        return None
    response = _ask(uri, "/version")
    said = str(response.text).strip()
    if response.status_code == 404 and _is_mlflows(_ask(uri, EXPERIMENT)):
        return None
    if response.status_code != 200 or not re.fullmatch(r"\d+\.\d+\S{0,20}", said):
        raise TrackingUnavailable(
            f"MLFLOW_TRACKING_URI={uri}: HTTP {response.status_code} and no version of MLflow. Are its port and path right, has "
            "another program taken the port, or is its database away? See the server's log"
        )
    ours = mlflow.version.VERSION
    if said.split(".")[:2] != ours.split(".")[:2]:
        raise TrackingUnavailable(
            f"the server at {uri} is MLflow {said} and this environment has {ours}: clients and servers of different minor "
            "versions are not used together. Point MLFLOW_TRACKING_URI at another server, or upgrade the older of the two"
        )
    return said


def _ask(uri: str, path: str) -> Response:
    try:
        # With the credentials of MLflow's own environment variables, as every other request.
        response: Response = http_request(  # type: ignore[no-untyped-call]
            get_default_host_creds(uri),  # type: ignore[no-untyped-call]
            path,
            "GET",
            max_retries=RETRIES,
            timeout=10,
            raise_on_status=False,
        )
    except (MlflowException, RequestException) as error:
        raise TrackingUnavailable(
            f"MLFLOW_TRACKING_URI={uri} does not answer ({str(error).splitlines()[0]}); is the server running, and the address "
            "right? 'make ui' starts one here"
        ) from error
    if response.status_code in (401, 403):
        raise TrackingUnavailable(
            f"MLFLOW_TRACKING_URI={uri} answers HTTP {response.status_code}: "
            + (
                "it refuses the credentials; export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
                if response.status_code == 401
                else f"it does not serve {urlparse(uri).netloc}; add that to its MLFLOW_SERVER_ALLOWED_HOSTS"
            )
        )
    return response


def _is_mlflows(response: Response) -> bool:
    try:
        body = response.json()
    except ValueError:
        return False
    return isinstance(body, dict) and not body.keys().isdisjoint({"experiment", "error_code"})
