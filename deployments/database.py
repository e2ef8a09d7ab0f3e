"""A server's PostgreSQL before the server starts: whether it answers, lets the role in, has room, and is of this code's version.

The servers themselves say each of these as the last line of a traceback; MLflow asks a database that refuses its password for
minutes, and takes one of a later version for one to upgrade.
"""

import asyncio
import importlib.util
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg


class MissingVariable(ValueError):
    """The environment names a PostgreSQL, but not all that it takes to reach it."""


WAIT_S = 60.0
"""For a database that starts at the same time."""
ROOM = "create temporary table proving_ground_room as select md5(i::text) from generate_series(1, 250000) i"
"""About 16 MB, a segment of PostgreSQL's log; gone with the connection."""


@dataclass(frozen=True)
class Database:
    """One database, as a server's environment names it.

    Attributes:
        named_by: the variables, for messages.
        migrations: package and folder of its schema's revisions; None: the server brings its schema up by itself.
    """

    host: str
    port: int
    user: str
    name: str
    password: str = field(repr=False)
    named_by: str
    migrations: tuple[str, str] | None = None
    upgrade: str | None = None
    """Command that brings an older schema up; None: the server does it when it starts."""

    def __str__(self) -> str:
        return f"database {self.name} on {self.host}:{self.port} as {self.user} ({self.named_by})"


def prefects(environment: Mapping[str, str]) -> Database | None:
    """Prefect's, or None where it is a file (SQLite).

    Raises:
        MissingVariable: the environment does not say where it is.
    """
    prefix = "PREFECT_SERVER_DATABASE_"
    if not environment.get(f"{prefix}DRIVER", "").startswith("postgresql"):
        return None
    host, user, name = _values(environment, f"{prefix}DRIVER", [f"{prefix}HOST", f"{prefix}USER", f"{prefix}NAME"])
    return Database(
        host=host,
        port=int(environment.get(f"{prefix}PORT", "5432")),
        user=user,
        name=name,
        password=environment.get(f"{prefix}PASSWORD", ""),
        named_by=f"{prefix}*",
        migrations=("prefect", "server/database/_migrations/versions/postgresql"),
    )


def mlflows(environment: Mapping[str, str]) -> Database | None:
    """MLflow's, or None where its address says all of it or it is a file: ours leaves host, user and password to PG*.

    Raises:
        MissingVariable: the environment does not say where it is.
    """
    uri = environment.get("MLFLOW_BACKEND_STORE_URI", "")
    if not uri.startswith("postgresql+psycopg2:///"):
        return None
    host, user = _values(environment, "MLFLOW_BACKEND_STORE_URI", ["PGHOST", "PGUSER"])
    return Database(
        host=host,
        port=int(environment.get("PGPORT", "5432")),
        user=user,
        # Without its options, as ?sslmode=require.
        name=urlsplit(uri).path.removeprefix("/"),
        password=environment.get("PGPASSWORD", ""),
        named_by="PGHOST, PGPORT, PGUSER, PGPASSWORD, MLFLOW_BACKEND_STORE_URI",
        migrations=("mlflow", "store/db_migrations/versions"),
        upgrade=f"mlflow db upgrade {uri}",
    )


def _values(environment: Mapping[str, str], given: str, names: Sequence[str]) -> list[str]:
    if missing := [name for name in names if not environment.get(name)]:
        raise MissingVariable(
            f"{given} names a PostgreSQL and {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: set "
            f"{'it' if len(missing) == 1 else 'them'} as infra/docker/compose.yaml does"
        )
    return [environment[name] for name in names]


def problem_of(database: Database, *, wait_s: float = WAIT_S) -> str | None:
    """Why a server cannot work with it and what to do, or None. One that does not answer yet is waited for."""
    deadline = time.monotonic() + wait_s
    is_waiting = False
    while True:
        try:
            return asyncio.run(_look(database))
        except (OSError, TimeoutError, asyncpg.CannotConnectNowError) as error:
            if time.monotonic() > deadline:
                return (
                    f"{database} does not answer after {wait_s:g} s ({type(error).__name__}: {error}): is PostgreSQL running, "
                    "are host and port right, does a network policy or firewall stand between?"
                )
            if not is_waiting:
                print(f"waiting up to {wait_s:g} s for {database}: {error}", file=sys.stderr, flush=True)
            is_waiting = True
        time.sleep(1)


async def _look(database: Database) -> str | None:
    try:
        connection = await asyncpg.connect(
            host=database.host,
            port=database.port,
            user=database.user,
            password=database.password,
            database=database.name,
            timeout=10,
        )
    except (asyncpg.InvalidPasswordError, asyncpg.InvalidAuthorizationSpecificationError) as error:
        return (
            f"{database} refuses the credentials ({error}): the password is the one that databases.sh read when it was "
            "made; give that one, or change the role's (alter role ... password)"
        )
    except (asyncpg.InvalidCatalogNameError, asyncpg.InsufficientPrivilegeError) as error:
        return f"{database} cannot be used ({error}): infra/databases/databases.sh makes the databases and their roles"
    except asyncpg.TooManyConnectionsError as error:
        return f"{database} takes no more connections ({error}): end some, or raise PostgreSQL's max_connections"
    try:
        try:
            await connection.execute(ROOM)
        except asyncpg.DiskFullError as error:
            return f"{database}: its volume is full ({str(error).splitlines()[0]}; 16 MB are wanted): enlarge it, or free some"
        return await _revision_problem(connection, database)
    finally:
        await connection.close()


async def _revision_problem(connection: asyncpg.Connection, database: Database) -> str | None:
    if database.migrations is None or await connection.fetchval("select to_regclass('alembic_version')") is None:
        # New: the server makes its tables.
        return None
    found = await connection.fetchval("select version_num from alembic_version")
    known, head = revisions(*database.migrations)
    package = database.migrations[0]
    if found not in known:
        return (
            f"{database} was written by another version of {package}: its schema is {found}, this one knows those up to {head}. "
            "Start the version that wrote it (the newer image), or restore the backup from before the upgrade: docs/runbook.md"
        )
    if found != head and database.upgrade is not None:
        return (
            f"{database} has {package}'s schema {found} and this version wants {head}: make a backup, then run "
            f"'{database.upgrade}' in this environment (docs/runbook.md, Upgrade)"
        )
    return None


def revisions(package: str, folder: str) -> tuple[set[str], str]:
    """Every revision of a schema that an installed package knows, and the newest. Read as text: to import them takes seconds."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    known: set[str] = set()
    followed: set[str] = set()
    for file in Path(spec.submodule_search_locations[0], folder).glob("*.py"):
        text = file.read_text()
        known |= set(re.findall(r"^revision\b[^=]*= *[\"'](\w+)", text, re.M))
        for line in re.findall(r"^down_revision\b[^=]*=(.*)", text, re.M):
            followed |= set(re.findall(r"[\"'](\w+)[\"']", line))
    [head] = known - followed
    return known, head
