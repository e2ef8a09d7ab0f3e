"""Whether the Prefect server that the settings name can be used, and if not, why and what to do."""

import json

import httpx
import prefect
from prefect.client.orchestration import SyncPrefectClient
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings


class ServerProblem(RuntimeError):
    """The server cannot be used; the message says what to do."""


def server_address() -> str:
    """PREFECT_API_URL.

    Raises:
        ServerProblem: it is not set; Prefect would start a server of its own for the moment.
    """
    address = PREFECT_API_URL.value()
    if not address:
        raise ServerProblem("PREFECT_API_URL names no server; export it, as http://127.0.0.1:4200/api ('make ui')")
    return str(address)


def check_server(client: SyncPrefectClient) -> str:
    """The server's version.

    Raises:
        ServerProblem: it does not answer, is no Prefect server, refuses the credentials, is of another version, has no database.
    """
    address = str(client.api_url)
    try:
        # Prefect's own would be a minute for a database that is away.
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: min(2, PREFECT_CLIENT_MAX_RETRIES.value())}):
            _check_health(client, address)
            version = client.request("GET", "/admin/version").json()
            _check_version(str(version), address)
            _check_database(client, address)
    except httpx.TransportError as error:
        raise ServerProblem(
            f"PREFECT_API_URL={address} does not answer ({type(error).__name__}: {error}); is the server running, and the "
            "address right? 'make ui' starts one here"
        ) from error
    except PrefectHTTPStatusError as error:
        raise ServerProblem(_refused(address, error.response)) from error
    return str(version)


def _check_health(client: SyncPrefectClient, address: str) -> None:
    response = client.request("GET", "/health")
    try:
        is_prefect = response.json() is True
    except json.JSONDecodeError:
        is_prefect = False
    if not is_prefect:
        raise ServerProblem(
            f"PREFECT_API_URL={address}: something answers there that is not Prefect (HTTP {response.status_code}, "
            f"{response.headers.get('content-type', 'no content type')}). Has another program taken the port? The address ends "
            "in /api"
        )


def _check_version(version: str, address: str) -> None:
    ours = prefect.__version__
    if version.split(".")[:2] != ours.split(".")[:2]:
        raise ServerProblem(
            f"the server at {address} is Prefect {version} and this environment has {ours}: clients and servers of different "
            "minor versions are not used together. Point PREFECT_API_URL at another server, or upgrade the older of the two"
        )


def _check_database(client: SyncPrefectClient, address: str) -> None:
    """The server answers its health check whatever its database does."""
    try:
        client.request("GET", "/ready")
    except PrefectHTTPStatusError as error:
        raise ServerProblem(
            f"PREFECT_API_URL={address}: the server runs but cannot use its database (/ready: {error.response.status_code}): "
            "is PostgreSQL up, has its volume room, are the server's PREFECT_SERVER_DATABASE_* right? See the server's log"
        ) from error


def _refused(address: str, response: httpx.Response) -> str:
    if response.status_code in (401, 403):
        return (
            f"PREFECT_API_URL={address} refuses the credentials (HTTP {response.status_code}): export "
            "PREFECT_API_AUTH_STRING=user:password as the server has it in PREFECT_SERVER_API_AUTH_STRING"
        )
    return (
        f"PREFECT_API_URL={address} answers HTTP {response.status_code}: not a healthy Prefect server; see its log, and whether "
        "the address ends in /api"
    )
