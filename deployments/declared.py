"""What ``prefect.yaml`` declares, adapted to a site, as the server is to know it; parameters are held to the code.

A site is one YAML file (``infra/slurm/site.yaml``, ``infra/kubernetes/site.yaml`` are examples): in which work pool the
deployments run, where the worker finds this code, and which settings differ there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from prefect.exceptions import ParameterTypeError, SignatureMismatchError
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.contracts.cluster_settings import ClusterCheck
from tasks.contracts.frozen_settings import Settings
from tasks.contracts.overrides import SettingsError, apply_overrides, read_settings
from tasks.contracts.settings import Experiment

REPOSITORY = Path(__file__).resolve().parents[1]
PREFECT_YAML = REPOSITORY / "deployments" / "prefect.yaml"


class Site(Settings):
    """How a customer's place differs from a laptop."""

    work_pool: str = Field(default="local", min_length=1)
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


class _Entry(BaseModel):
    """One deployment of prefect.yaml; ``prefect deploy`` reads the same."""

    model_config = ConfigDict(extra="forbid")

    name: str
    entrypoint: str
    description: str = Field(min_length=1)
    tags: list[str] = Field(min_length=1)
    work_pool: dict[str, Any]
    parameters: dict[str, Any]
    schedules: list[dict[str, Any]] = []
    concurrency_limit: int | dict[str, Any] | None = None


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
        return Site.model_validate(yaml.safe_load(path.read_text()) or {})
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}; infra/slurm/site.yaml is an example") from error
    except (ValidationError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: {error}") from error


def read_declared(site: Site, file: Path = PREFECT_YAML) -> list[Declared]:
    """Every deployment of the file, as ``site`` wants it.

    Raises:
        SettingsError: listing each deployment whose parameters do not fit the code, with what is wrong.
    """
    declared: list[Declared] = []
    problems: list[str] = []
    for values in yaml.safe_load(file.read_text())["deployments"]:
        try:
            declared.append(_declare(_Entry.model_validate(values), site))
        except (SettingsError, ValidationError, ParameterTypeError, SignatureMismatchError, ImportError) as error:
            lines = str(error).splitlines()
            problems.append("\n    ".join([f"{values.get('name')} ({values.get('entrypoint')}):", *lines]))
    known = {deployment.full_name for deployment in declared}
    if not problems:
        problems += [
            f"the site names {name!r}, which is no deployment; there are: {', '.join(sorted(known))}"
            for name in {*site.parameters, *site.active_schedules} - known
        ]
    if problems:
        raise SettingsError("\n".join(problems))
    return declared


@cache
def _load(entrypoint: str) -> Any:
    """The flow; several deployments have one, and loading it runs its module."""
    return load_flow_from_entrypoint(entrypoint)


def _declare(entry: _Entry, site: Site) -> Declared:
    flow = _load(entry.entrypoint)
    full_name = f"{flow.name}/{entry.name}"
    parameters = entry.parameters | site.parameters.get(full_name, {})
    for settings, model in (("experiment", Experiment), ("check", ClusterCheck)):
        if settings in parameters:
            parameters[settings] = apply_overrides(parameters[settings], _overrides(site, entry, settings), model)
            # For its errors, which name the setting and what it may be.
            read_settings(model, parameters[settings])
    flow.validate_parameters(parameters)
    is_active = full_name in site.active_schedules
    limit = entry.concurrency_limit
    return Declared(
        flow.name,
        entry.name,
        {
            "description": entry.description,
            "tags": sorted(entry.tags),
            "entrypoint": entry.entrypoint,
            "work_pool_name": site.work_pool if entry.work_pool["name"] == "local" else entry.work_pool["name"],
            "job_variables": _job_variables(entry, site),
            "parameters": parameters,
            "schedules": [_schedule(values, is_active=is_active) for values in entry.schedules],
            "concurrency_limit": limit["limit"] if isinstance(limit, dict) else limit,
            "collision_strategy": _strategy(limit),
            "pull_steps": [_pull_step(site.directory or str(REPOSITORY))],
            "parameter_openapi_schema": parameter_schema(flow).model_dump_for_openapi(),
        },
    )


def _job_variables(entry: _Entry, site: Site) -> dict[str, Any]:
    """Among them the heartbeats that the automations count on, whatever the worker was started with."""
    variables: dict[str, Any] = entry.work_pool.get("job_variables", {}) | site.job_variables
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


def _schedule(values: Mapping[str, Any], *, is_active: bool) -> dict[str, Any]:
    if "cron" not in values or "timezone" not in values:
        raise SettingsError(f"schedule {dict(values)}: give cron and timezone, as timezone: Europe/Amsterdam")
    return {
        "cron": values["cron"],
        "timezone": values["timezone"],
        "active": is_active or bool(values.get("active", True)),
    }


def _strategy(limit: int | dict[str, Any] | None) -> Literal["ENQUEUE", "CANCEL_NEW"] | None:
    if limit is None:
        return None
    return limit.get("collision_strategy", "ENQUEUE") if isinstance(limit, dict) else "ENQUEUE"
