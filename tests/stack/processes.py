"""The services of compose.yaml as processes of this machine, with a real PostgreSQL; each can be killed and restarted."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

from infra.docker.make_secrets import HUB_TOKEN, make_secrets
from tasks.hardware.host import free_port
from tests.conftest import REPOSITORY
from tests.stack.compose import Service, read_compose

HOST = "127.0.0.1"
START_LIMIT_S = 120
POSTGRES_USER = "postgres"


def postgres_binaries() -> Path:
    """The newest installed server's folder.

    Raises:
        SystemExit: there is none; Debian's package is ``postgresql``.
    """
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if not found:
        raise SystemExit("no PostgreSQL here: apt-get install postgresql")
    return found[-1]


class Stack:
    """PostgreSQL, Prefect, MLflow and a worker under one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = {name: free_port() for name in ("postgres", "prefect", "mlflow", "worker")}
        self.processes: dict[str, subprocess.Popen] = {}
        self.secrets = folder / "secrets"
        # PostgreSQL refuses to be root; its data lie where its own user may go.
        self.postgres_folder = Path("/tmp") / f"proving-ground-postgres-{os.getpid()}"
        self.services = read_compose(self._values())

    def _values(self) -> dict[str, str]:
        return {
            "BIND": HOST,
            "POSTGRES_HOST": HOST,
            "PREFECT_HOST": HOST,
            "MLFLOW_HOST": HOST,
            "POSTGRES_PORT": str(self.ports["postgres"]),
            "PREFECT_PORT": str(self.ports["prefect"]),
            "MLFLOW_PORT": str(self.ports["mlflow"]),
            "WORKER_PORT": str(self.ports["worker"]),
            "SECRETS": str(self.secrets),
            # This checkout, on this machine.
            "SITE": os.devnull,
            "HOME_FOLDER": str(self.folder / "homes"),
            "ARTIFACTS": str(self.folder / "artifacts"),
            "CODE": str(REPOSITORY),
        }

    def __enter__(self) -> "Stack":
        # Prefect makes its home, but not the folder around it.
        (self.folder / "homes").mkdir(parents=True, exist_ok=True)
        make_secrets(self.secrets)
        # It may be empty; here it is planted, to be searched for in what a run leaves.
        token = self.secrets / HUB_TOKEN
        token.write_text("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")
        try:
            self._make_databases()
            for name in ("prefect", "mlflow"):
                self.start(name)
            for name in ("prefect", "mlflow"):
                self.wait_for(name)
            self.run_once("deploy")
            self.start("worker")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for name in reversed(list(self.processes)):
            self.kill(name, signal.SIGTERM)
        # Flows and jobs have sessions of their own and outlive the worker, as they must.
        for process in flows_under(self.folder):
            with suppress(psutil.Error):
                process.kill()
        shutil.rmtree(self.postgres_folder, ignore_errors=True)

    # PostgreSQL

    def _make_databases(self) -> None:
        binaries = postgres_binaries()
        self.postgres_folder.mkdir(mode=0o700)
        shutil.chown(self.postgres_folder, POSTGRES_USER)
        data = self.postgres_folder / "data"
        initdb = [binaries / "initdb", "-D", data, "--auth-host=scram-sha-256", "--auth-local=trust"]
        subprocess.run(initdb, user=POSTGRES_USER, cwd="/tmp", check=True, stdout=subprocess.DEVNULL)
        self.start("postgres")
        self.wait_for("postgres")
        subprocess.run(
            [REPOSITORY / "infra" / "databases" / "databases.sh"],
            env=os.environ
            | self.client_environment()
            | {"SECRETS": str(self.secrets), "PGHOST": str(self.postgres_folder)},
            check=True,
        )

    def client_environment(self) -> dict[str, str]:
        """What psql and pg_dump need to be PostgreSQL's administrator here."""
        return {"PGHOST": str(self.postgres_folder), "PGPORT": str(self.ports["postgres"]), "PGUSER": POSTGRES_USER}

    def _postgres_command(self) -> list[str]:
        # The image adds what its own entry point knows; the options of compose.yaml follow.
        return [
            str(postgres_binaries() / "postgres"), "-D", str(self.postgres_folder / "data"), "-p", str(self.ports["postgres"]),
            "-c", f"listen_addresses={HOST}", "-c", f"unix_socket_directories={self.postgres_folder}",
            *self.services["postgres"].command[1:],
        ]  # fmt: skip

    # Processes

    def start(self, name: str) -> None:
        """Start one service, or start it again."""
        log = (self.folder / f"{name}.log").open("ab")
        if name == "postgres":
            command, environment, user = self._postgres_command(), {}, POSTGRES_USER
        else:
            command, environment, user = self._command(self.services[name]), dict(self.services[name].environment), None
        self.processes[name] = subprocess.Popen(
            command,
            env=self._base_environment() | environment,
            cwd="/tmp" if user else REPOSITORY,
            user=user,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        log.close()

    def run_once(self, name: str) -> None:
        """A service that ends by itself, waited for."""
        service = self.services[name]
        environment = self._base_environment() | dict(service.environment)
        subprocess.run(self._command(service), env=environment, cwd=REPOSITORY, check=True)

    def _base_environment(self) -> dict[str, str]:
        """Of this machine only what a container has too: no setting of whoever runs the test."""
        kept = ("PATH", "HOME", "LANG", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {name: os.environ[name] for name in kept if name in os.environ} | {"PATH": path, "HF_HUB_OFFLINE": "1"}

    def _command(self, service: Service) -> list[str]:
        return [sys.executable, str(REPOSITORY / "infra" / "docker" / "with_secrets.py"), *service.command]

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Signal every process of a service; of a worker not the flows that it started, which have sessions of their own."""
        process = self.processes[name]
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)

    def wait_for(self, name: str) -> None:
        """Until a service answers.

        Raises:
            SystemExit: it ended, or does not answer in time; its log's end is shown.
        """
        deadline = time.monotonic() + START_LIMIT_S
        while not self._answers(name):
            if self.processes[name].poll() is not None or time.monotonic() > deadline:
                tail = "\n".join((self.folder / f"{name}.log").read_text(errors="replace").splitlines()[-25:])
                raise SystemExit(f"{name} does not answer (exit status {self.processes[name].poll()}):\n{tail}")
            time.sleep(0.2)

    def _answers(self, name: str) -> bool:
        if name == "postgres":
            ready = [postgres_binaries() / "pg_isready", "-q", "-h", HOST, "-p", str(self.ports["postgres"])]
            return subprocess.run(ready).returncode == 0
        if name == "worker":
            return self.processes[name].poll() is None
        try:
            return httpx.get(
                f"http://{HOST}:{self.ports[name]}{'/api' if name == 'prefect' else ''}/health", timeout=2
            ).is_success
        except httpx.HTTPError:
            return False

    # What clients need

    def secret(self, name: str) -> str:
        return (self.secrets / name).read_text()

    def environment(self) -> dict[str, str]:
        """A client's, with credentials."""
        service = self.services["worker"].environment
        values = {name: value for name, value in service.items() if not name.endswith("_FROM_FILE")}
        return values | {
            "PREFECT_API_AUTH_STRING": self.secret("prefect_auth"),
            "MLFLOW_TRACKING_PASSWORD": self.secret("mlflow_admin_password"),
        }

    def run(self, command: Sequence[str | Path], **options: object) -> subprocess.CompletedProcess:
        """A client's command, its output captured."""
        return subprocess.run(
            command,
            env=self._base_environment() | self.environment(),
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            **options,
        )  # type: ignore[call-overload]


def flows_under(folder: Path) -> list[psutil.Process]:
    """Processes other than this one that name the folder in their command or environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            named = [*process.cmdline(), *process.environ().values()]
            if process.pid != os.getpid() and any(str(folder) in text for text in named):
                found.append(process)
    return found
