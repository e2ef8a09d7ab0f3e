"""What ``prefect.yaml`` declares, adapted to a site, as the server is to know it; parameters are held to the code.

A site is one YAML file (``infra/slurm/site.yaml``, ``infra/kubernetes/site.yaml`` are examples): in which work pool the
deployments run, where the worker finds this code, and which settings differ there.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ParameterTypeError, SignatureMismatchError
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from deployments.automations import MISSED_HEARTBEATS, RECONCILE
from deployments.work_pools import WorkPoolName
from tasks.contracts.cluster_settings import ClusterCheck
from tasks.contracts.frozen_settings import Settings
from tasks.contracts.overrides import SettingsError, apply_overrides, read_settings
from tasks.contracts.settings import Experiment

REPOSITORY = Path(__file__).resolve().parents[1]
PREFECT_YAML = REPOSITORY / "deployments" / "prefect.yaml"
SETTINGS: dict[str, type[Experiment] | type[ClusterCheck]] = {"experiment": Experiment, "check": ClusterCheck}
"""The parameters of flows that are groups of settings."""
MAX_HEARTBEAT_S = 300
"""Three that stay away are a quarter of an hour, which is as long as the nightly check waits for a pool that a left run holds."""


class Site(Settings):
    """How a customer's place differs from a laptop."""

    work_pool: WorkPoolName = "local"
    """Work pool of every deployment; `kubernetes` is one whose flows are pods."""
    directory: str | None = Field(default=None, pattern=r"^/")
    """Absolute path of this repository where the flows run; empty: this checkout."""
    overrides: tuple[str, ...] = ()
    """Assignments to the settings of every deployment with the tag `gpu`, as `pool.backend=slurm`: of `finetune` all of them, of
    `cluster-check` those of `pool` and `storage`. Those of `storage` are every deployment's."""
    parameters: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Parameters that replace those of single deployments, as `{reconcile/left-runs: {storage: /shared/storage}}`."""
    active_schedules: tuple[str, ...] = ()
    """Deployments whose schedules are switched on, as `finetune/scheduled`. All others begin as prefect.yaml says and stay as
    somebody switches them on the server."""
    job_variables: dict[str, Any] = Field(default_factory=dict)
    """Job variables of every deployment, as `image`; never a secret."""
    heartbeat_s: int = Field(default=30, ge=30)
    """How often a flow run says that it lives; after three that stay away it is taken over. Prefect sends none more often."""

    @field_validator("heartbeat_s")
    @classmethod
    def _is_soon_enough(cls, value: int) -> int:
        if value > MAX_HEARTBEAT_S:
            raise ValueError(
                f"{value} s between heartbeats are more than {MAX_HEARTBEAT_S}: only after {MISSED_HEARTBEATS} that stay away is "
                f"a run taken over and anybody told, and its GPUs would be held for {MISSED_HEARTBEATS * value / 60:.0f} minutes "
                f"by nobody; give 30 to {MAX_HEARTBEAT_S}"
            )
        return value


class _Part(BaseModel):
    """A part of prefect.yaml: nothing that we would leave out, and no value that is only nearly of its type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class _WorkPool(_Part):
    """Where a deployment's runs start."""

    name: WorkPoolName
    job_variables: dict[str, Any] = {}


class _Schedule(CronSchedule):
    """When a deployment's runs start by themselves."""

    model_config = ConfigDict(strict=True)

    # Neither may be left out: Prefect takes a schedule without a time zone for UTC's, which nobody meant who wrote an hour.
    cron: str = Field(default="", validate_default=True)
    timezone: str = Field(default="", min_length=1, validate_default=True)
    # The other way of Prefect's is not passed on.
    day_or: Literal[True] = True
    active: bool = True

    @field_validator("cron", mode="wrap")
    @classmethod
    def _is_one(cls, value: Any, handler: Callable[[Any], str]) -> str:
        try:
            return handler(value)
        except ValueError as error:
            raise ValueError(
                f"{value!r} is no cron; give minute, hour, day, month and weekday, as '0 2 * * 0'"
            ) from error


class _Limit(_Part):
    """How many runs of a deployment there are at once, and what becomes of the next."""

    limit: int = Field(ge=1)
    collision_strategy: Literal["ENQUEUE", "CANCEL_NEW"] = "ENQUEUE"


def _as_limit(value: object) -> object:
    """A number alone is a limit too, as ``prefect deploy`` reads it."""
    return {"limit": value} if isinstance(value, int) else value


class _Entry(_Part):
    """One deployment of prefect.yaml; ``prefect deploy`` reads the same."""

    name: str
    entrypoint: str
    description: str = Field(min_length=1)
    tags: list[str] = Field(min_length=1)
    work_pool: _WorkPool
    parameters: dict[str, Any]
    schedules: list[_Schedule] = []
    concurrency_limit: Annotated[_Limit | None, BeforeValidator(_as_limit)] = None


@dataclass(frozen=True)
class Declared:
    """One deployment as it shall be.

    Attributes:
        fields: what is sent to the server, by the server's own names, in JSON's types.
    """

    flow: str
    name: str
    fields: Mapping[str, Any]

    @property
    def full_name(self) -> str:
        """As in ``prefect deployment run``."""
        return f"{self.flow}/{self.name}"


def read_site(path: Path | None) -> Site:
    """A site's file; without one, this machine.

    Raises:
        SettingsError: the file cannot be read, or says what no site has.
    """
    if path is None:
        return Site()
    try:
        return read_settings(Site, yaml.safe_load(path.read_text()) or {})
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}; infra/slurm/site.yaml is an example") from error
    except (SettingsError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: {error}") from error


def read_declared(site: Site, file: Path = PREFECT_YAML) -> list[Declared]:
    """Every deployment of the file, as ``site`` wants it.

    Raises:
        SettingsError: listing each deployment whose parameters do not fit the code, or that says what Prefect would refuse or
            never start, with what is wrong.
    """
    declared: list[Declared] = []
    problems: list[str] = []
    for values in yaml.safe_load(file.read_text())["deployments"]:
        try:
            declared.append(_declare(_entry(values), site))
        except (SettingsError, ParameterTypeError, SignatureMismatchError, ImportError) as error:
            lines = str(error).splitlines()
            problems.append("\n    ".join([f"{values.get('name')} ({values.get('entrypoint')}):", *lines]))
    times = Counter(deployment.full_name for deployment in declared)
    known = times.keys()
    problems += [
        f"{name}: there are {count} deployments of this name, and the server would know only the last; rename all but one"
        for name, count in times.items()
        if count > 1
    ]
    if not problems:
        problems += _unwatched(declared)
        problems += [
            f"the site names {name!r}, which is no deployment; there are: {', '.join(sorted(known))}"
            for name in {*site.parameters, *site.active_schedules} - known
        ]
    if problems:
        raise SettingsError("\n".join(problems))
    return declared


def _entry(values: dict[str, Any]) -> _Entry:
    missing = [name for name, field in _Entry.model_fields.items() if field.is_required() and name not in values]
    if missing:
        # What read_settings says of it would point to a command line.
        raise SettingsError(f"{', '.join(missing)}: must be given, as the other deployments in prefect.yaml do")
    return read_settings(_Entry, values)


def _unwatched(declared: Sequence[Declared]) -> list[str]:
    """What keeps its runs where ``reconcile``, which looks into one folder, would not see that they were left."""
    watched = [d.fields["parameters"].get("storage") for d in declared if d.full_name == RECONCILE]
    # A file without that deployment has nothing that looks into any folder.
    return [
        f"{deployment.full_name} keeps its runs in storage.shared={shared!r} and {RECONCILE} looks into storage={folder!r}, so "
        f"that nobody would take over a run that was left: give both the same folder. A site's storage.shared is every "
        f"deployment's and goes with parameters: {{{RECONCILE}: {{storage: {shared}}}}}"
        for deployment in declared
        for shared in _shared(deployment.fields["parameters"])
        for folder in watched
        if folder is None or Path(folder) != Path(shared)
    ]


def _shared(parameters: Mapping[str, Any]) -> list[str]:
    """Where the runs of a deployment lie; none: it has no runs of its own."""
    return [read_settings(m, parameters[name]).storage.shared for name, m in SETTINGS.items() if name in parameters]


@cache
def _load(entrypoint: str) -> Any:
    """The flow; several deployments have one, and loading it runs its module."""
    return load_flow_from_entrypoint(entrypoint)


def _declare(entry: _Entry, site: Site) -> Declared:
    flow = _load(entry.entrypoint)
    full_name = f"{flow.name}/{entry.name}"
    parameters = entry.parameters | site.parameters.get(full_name, {})
    for settings, model in SETTINGS.items():
        if settings in parameters:
            parameters[settings] = apply_overrides(parameters[settings], _overrides(site, entry, settings), model)
            # For its errors, which name the setting and what it may be.
            read_settings(model, parameters[settings])
    flow.validate_parameters(parameters)
    is_active = full_name in site.active_schedules
    pool, limit = entry.work_pool, entry.concurrency_limit
    return Declared(
        flow.name,
        entry.name,
        {
            "description": entry.description,
            "tags": sorted(entry.tags),
            "entrypoint": entry.entrypoint,
            "work_pool_name": site.work_pool if pool.name == "local" else pool.name,
            "job_variables": _job_variables(entry, site),
            "parameters": parameters,
            "schedules": [_schedule(schedule, is_active=is_active) for schedule in entry.schedules],
            "concurrency_limit": limit.limit if limit else None,
            "collision_strategy": limit.collision_strategy if limit else None,
            "pull_steps": [_pull_step(site.directory or str(REPOSITORY))],
            "parameter_openapi_schema": parameter_schema(flow).model_dump_for_openapi(),
        },
    )


def _job_variables(entry: _Entry, site: Site) -> dict[str, Any]:
    """Among them the heartbeats that the automations count on, whatever the worker was started with."""
    variables: dict[str, Any] = entry.work_pool.job_variables | site.job_variables
    heartbeats = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(site.heartbeat_s)}
    return variables | {"env": heartbeats | variables.get("env", {})}


def _overrides(site: Site, entry: _Entry, settings: str) -> list[str]:
    """What of a site's assignments a deployment gets: where files lie, all of them; the rest is about its GPUs."""
    reached = ("storage.", *(("pool.", "") if "gpu" in entry.tags else ()))
    if settings == "check":
        # A cluster check has the pool and the storage of a training, and nothing else of it.
        reached = tuple(prefix for prefix in reached if prefix)
    return [assignment for assignment in site.overrides if assignment.startswith(reached)]


def _pull_step(directory: str) -> dict[str, Any]:
    return {"prefect.deployments.steps.set_working_directory": {"directory": directory}}


def _schedule(schedule: _Schedule, *, is_active: bool) -> dict[str, Any]:
    return {"cron": schedule.cron, "timezone": schedule.timezone, "active": is_active or schedule.active}
