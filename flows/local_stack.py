"""The servers of one laptop: Prefect, MLflow and, for the UI, a worker with every deployment. All on localhost.

``python -m flows.local_stack`` (``make ui``) runs them until Ctrl-C. A flow that finds no server starts its own two for
its own time with :func:`temporary_stack`, on the same databases, so that ``make ui`` later shows the run.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.prefect_server import ServerProblem, check_server
from tasks.hardware.host import free_port
from tasks.tracking.server import TrackingUnavailable, check_mlflow

HOST = "127.0.0.1"
PREFECT_PORT, MLFLOW_PORT = 4200, 5000
START_LIMIT_S = 120
ROOM_GBYTES = 0.5
"""What is to be free for the servers' databases and artifacts; how much a run needs is its own setting."""
WORK_POOL = "local"
ANOTHER_VERSION = (
    "the database in {folder} was written by another version: start that version ('pip list' says which this is), or choose "
    "another --storage; what lies there stays as it is"
)
NEXT_STEPS = {
    "Can't locate revision": ANOTHER_VERSION,
    "out-of-date database schema": ANOTHER_VERSION,
    "Connect call failed": "the environment names a database that does not answer: unset PREFECT_SERVER_DATABASE_* and "
    "PREFECT_API_DATABASE_CONNECTION_URL, 'make ui' has its own",
    "password authentication failed": "the environment names a database that refuses its password: unset "
    "PREFECT_SERVER_DATABASE_* and PREFECT_API_DATABASE_CONNECTION_URL, 'make ui' has its own",
    "No space left on device": "{folder} is full: free some, or choose another --storage",
    "database or disk is full": "{folder} is full: free some, or choose another --storage",
}
"""What to do about a server that ended, by what stands in its log."""
REPOSITORY = Path(__file__).resolve().parents[1]


class StackError(RuntimeError):
    """A server did not start."""


@dataclass(frozen=True)
class Addresses:
    """Where the two servers are."""

    prefect_api: str
    mlflow: str

    def environment(self) -> dict[str, str]:
        """What a process needs to use them."""
        return {"PREFECT_API_URL": self.prefect_api, "MLFLOW_TRACKING_URI": self.mlflow}


@dataclass
class _Server:
    name: str
    process: subprocess.Popen[bytes]
    health: str
    log: Path
    log_begins: int
    """Where this start's part of the log begins, in bytes: the file keeps what earlier ones wrote."""


def is_up(health_url: str) -> bool:
    """Whether a server answers its health check."""
    try:
        return httpx.get(health_url, timeout=2).is_success
    except httpx.HTTPError:
        return False


def configured_stack() -> Addresses | None:
    """The servers that the environment names, for those who have their own.

    Raises:
        StackError: only one of the two is named, or one cannot be used: away, refusing, without its database, of another version.
    """
    prefect_api, mlflow = os.environ.get("PREFECT_API_URL"), os.environ.get("MLFLOW_TRACKING_URI")
    if not prefect_api and not mlflow:
        return None
    if not prefect_api or not mlflow:
        raise StackError("PREFECT_API_URL and MLFLOW_TRACKING_URI belong together: set both, or neither")
    return _usable(Addresses(prefect_api.rstrip("/"), mlflow.rstrip("/")))


def running_stack() -> Addresses | None:
    """The servers of ``make ui``, if both are up on their usual ports.

    Raises:
        StackError: something answers on both that cannot be used: of another version, or no Prefect and MLflow at all.
    """
    addresses = _addresses(PREFECT_PORT, MLFLOW_PORT)
    both = is_up(f"{addresses.prefect_api}/health") and is_up(f"{addresses.mlflow}/health")
    return _usable(addresses) if both else None


def _usable(addresses: Addresses) -> Addresses:
    try:
        with temporary_settings({PREFECT_API_URL: addresses.prefect_api}), get_client(sync_client=True) as client:
            check_server(client)
        check_mlflow(addresses.mlflow)
    except (ServerProblem, TrackingUnavailable) as error:
        raise StackError(str(error)) from error
    return addresses


@contextmanager
def temporary_stack(storage: Path) -> Iterator[Addresses]:
    """Both servers on free ports while the block runs; nothing of them is left afterwards.

    Raises:
        StackError: one did not come up; the message shows the end of its log.
    """
    with _servers(storage, free_port(), free_port()) as addresses:
        yield addresses


@contextmanager
def _servers(storage: Path, prefect_port: int, mlflow_port: int) -> Iterator[Addresses]:
    folder = storage / "servers"
    _check_room(folder)
    addresses = _addresses(prefect_port, mlflow_port)
    servers: list[_Server] = []
    try:
        servers.append(_start_prefect(folder, prefect_port, addresses))
        servers.append(_start_mlflow(folder, mlflow_port, addresses))
        for server in servers:
            _wait_for(server)
        yield addresses
    finally:
        _stop([server.process for server in servers])


def _addresses(prefect_port: int, mlflow_port: int) -> Addresses:
    return Addresses(f"http://{HOST}:{prefect_port}/api", f"http://{HOST}:{mlflow_port}")


def _start_prefect(folder: Path, port: int, addresses: Addresses) -> _Server:
    log = folder / "prefect.log"
    environment = {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": addresses.prefect_api,
        "PREFECT_UI_API_URL": addresses.prefect_api,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    return _start("Prefect", command, environment, f"{addresses.prefect_api}/health", log)


def _start_mlflow(folder: Path, port: int, addresses: Addresses) -> _Server:
    log = folder / "mlflow.log"
    database, artifacts = folder / "mlflow.db", folder / "mlflow-artifacts"
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{database}", "--artifacts-destination", str(artifacts),
    ]  # fmt: skip
    environment = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "MLFLOW_SERVER_ALLOWED_HOSTS": f"{HOST}:{port},localhost:{port}",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    return _start("MLflow", command, environment, f"{addresses.mlflow}/health", log)


def _start(name: str, command: Sequence[str], environment: dict[str, str], health: str, log: Path) -> _Server:
    log_begins = log.stat().st_size if log.exists() else 0
    return _Server(name, _spawn(command, environment, log), health, log, log_begins)


def _spawn(command: Sequence[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """A process in its own session: Ctrl-C reaches the flow first, which ends its runs while the servers still answer."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            cwd=REPOSITORY,
            start_new_session=True,
        )


def _wait_for(server: _Server) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while not is_up(server.health):
        if server.process.poll() is not None or time.monotonic() > deadline:
            written = server.log.read_bytes()[server.log_begins :].decode(errors="replace")
            tail = "\n".join(written.splitlines()[-20:])
            what = "ended at once" if server.process.poll() is not None else f"is not up after {START_LIMIT_S} s"
            todo = [step.format(folder=server.log.parent) for sign, step in NEXT_STEPS.items() if sign in tail]
            raise StackError("\n".join([f"the {server.name} server {what}; the end of {server.log}:", tail, *todo[:1]]))
        time.sleep(0.2)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End every process with all its children."""
    for process in processes:
        _signal_group(process, signal.SIGTERM)
    deadline = time.monotonic() + 10
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, deadline - time.monotonic()))
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def _check_room(folder: Path) -> None:
    """A server whose disk is full ends without a word: it cannot write that either."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StackError(f"{folder} cannot be made: {error.strerror}; choose another --storage") from error
    if not os.access(folder, os.W_OK):
        raise StackError(f"{folder} may not be written by this user; choose another --storage")
    free = shutil.disk_usage(folder).free / 1e9
    if free < ROOM_GBYTES:
        raise StackError(
            f"{folder}: {free:.2f} GB are free and the servers want {ROOM_GBYTES:g} GB; free some, or choose another --storage"
        )


def _check_port(name: str, port: int) -> None:
    with socket.socket() as probe:
        if probe.connect_ex((HOST, port)) == 0:
            raise StackError(
                f"port {port} for {name} is taken; is 'make ui' running already? Find the owner with: ss -ltnp 'sport = "
                f":{port}'"
            )


def _run(command: Sequence[str], environment: dict[str, str]) -> None:
    subprocess.run(command, env=os.environ | environment, cwd=REPOSITORY, check=True)


def end_as_with_ctrl_c() -> None:
    """A command that is told to end, or whose terminal goes away, takes what it started with it, as with Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        # What nohup ignores stays ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.local_stack", description=__doc__.split("\n\n")[0])
    parser.add_argument("--storage", default="storage", help="folder of the databases and runs (default: %(default)s)")
    arguments = parser.parse_args()
    storage = Path(arguments.storage).resolve()
    worker: list[subprocess.Popen[bytes]] = []
    end_as_with_ctrl_c()
    try:
        _check_port("Prefect", PREFECT_PORT)
        _check_port("MLflow", MLFLOW_PORT)
        with _servers(storage, PREFECT_PORT, MLFLOW_PORT) as addresses:
            environment = addresses.environment() | {
                "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
                "DO_NOT_TRACK": "1",
            }
            prefect = [sys.executable, "-m", "prefect", "--no-prompt"]
            _run([sys.executable, "-m", "deployments.deploy"], environment)
            log = storage / "servers" / "worker.log"
            worker = [_spawn([*prefect, "worker", "start", "--pool", WORK_POOL], environment, log)]
            print(
                f"\n  Prefect  http://{HOST}:{PREFECT_PORT}   deployments, runs, artifacts"
                f"\n  MLflow   {addresses.mlflow}   curves, comparisons, models\n"
                "\n  Run a pipeline from another shell, here in the repository:"
                "\n      .venv/bin/prefect deployment run finetune/demo\n"
                f"\n  Logs are in {storage / 'servers'}. Ctrl-C stops everything.\n",
                flush=True,
            )
            code = worker[0].wait()
            raise StackError(f"the worker ended with exit code {code}; see {log}")
    except KeyboardInterrupt:
        print("\nstopping")
        return 0
    except (StackError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        _stop(worker)


if __name__ == "__main__":
    sys.exit(main())
