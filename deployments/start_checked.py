"""Look at what a server or a worker needs, then become it; what cannot work does not start, and says what to do.

    python -m deployments.start_checked prefect server start --host 0.0.0.0 --port 4200
    python -m deployments.start_checked mlflow server --host 0.0.0.0 --port 5000
    python -m deployments.start_checked prefect worker start --pool local

Of servers: the port, the database and its version, room for what they write. Of workers: both servers, credentials and versions.
Exit status 1: it was not started.
"""

import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NoReturn

from deployments.database import Database, MissingVariable, mlflows, prefects, problem_of

ROOM_GBYTES = {"PREFECT_HOME": 0.05, "MLFLOW_ARTIFACTS_DESTINATION": 1.0}
"""What is to be free where these variables point, if that is a folder."""


def problems(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[str]:
    """Everything that keeps ``command`` from working, each with what to do.

    Raises:
        ValueError: it is none of the three that are known.
    """
    yield from _full(environment)
    match tuple(command[:3]):
        case ("prefect", "server", "start"):
            yield from _port_taken(command)
            yield from _database(prefects, environment)
        case ("mlflow", "server", *_):
            yield from _port_taken(command)
            yield from _database(mlflows, environment)
        case ("prefect", "worker", "start"):
            yield from _servers(environment)
        case _:
            raise ValueError(
                f"{' '.join(command[:3])!r} is not 'prefect server start', 'mlflow server' or 'prefect worker start'"
            )


def _database(read: Callable[[Mapping[str, str]], Database | None], environment: Mapping[str, str]) -> Iterator[str]:
    try:
        database = read(environment)
    except MissingVariable as error:
        yield str(error)
        return
    if database is not None and (problem := problem_of(database)):
        yield problem


def _port_taken(command: Sequence[str]) -> Iterator[str]:
    host, port = (command[command.index(option) + 1] for option in ("--host", "--port"))
    with socket.socket() as probe:
        # A server that has just ended leaves connections behind, which keep nobody from listening.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            yield (
                f"--host {host} --port {port} cannot be listened on ({error.strerror}): find who has it with ss -ltnp 'sport = "
                f":{port}', end it, or choose another port"
            )


def _full(environment: Mapping[str, str]) -> Iterator[str]:
    for name, wanted in ROOM_GBYTES.items():
        value = environment.get(name, "")
        if not value.startswith("/"):
            # Not set, or an object storage.
            continue
        folder = Path(value)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            yield f"{name}={value} cannot be made: {error.strerror}; mount a volume there that this user may write"
            continue
        if not os.access(folder, os.W_OK):
            yield f"{name}={value} may not be written by user {os.getuid()}; give it to that user"
            continue
        free = shutil.disk_usage(folder).free / 1e9
        if free < wanted:
            yield f"{name}={value}: {free:.2f} GB are free and {wanted:g} GB are wanted; free some, or enlarge the volume"


def _servers(environment: Mapping[str, str]) -> Iterator[str]:
    # Prefect takes seconds to import, which only a worker needs here.
    from prefect.client.orchestration import get_client

    from flows.prefect_server import ServerProblem, check_server, server_address
    from tasks.tracking.server import TrackingUnavailable, check_mlflow

    try:
        server_address()
        with get_client(sync_client=True) as client:
            check_server(client)
    except ServerProblem as error:
        yield str(error)
    if uri := environment.get("MLFLOW_TRACKING_URI"):
        try:
            check_mlflow(uri)
        except TrackingUnavailable as error:
            yield str(error)


def main(command: Sequence[str]) -> NoReturn:
    if not command:
        sys.exit(__doc__)
    found = list(problems(command, os.environ))
    if found:
        sys.exit(
            "\n  ".join(
                [
                    f"error: {' '.join(takewhile(lambda word: not word.startswith('-'), command))} was not started:",
                    *found,
                ]
            )
        )
    os.execvp(command[0], list(command))  # noqa: S606 - The command is the image's own.


if __name__ == "__main__":
    main(sys.argv[1:])
