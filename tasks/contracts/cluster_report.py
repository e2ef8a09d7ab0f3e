"""What a cluster check measures and decides: a figure, a finding, a report (docs/cluster-check.schema.json)."""

from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1


class Frozen(BaseModel):
    """Base of what is written: frozen, and an unknown field is an error. Figures that are no numbers are written as null."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="null")


class Figure(Frozen):
    """One measured number."""

    name: str
    """With its unit, as `all_reduce_busbw_gbytes_per_s` (1 GB = 10^9 bytes)."""
    value: float | None
    """None, NaN or infinite: the measurement failed."""
    size_bytes: int | None = None
    """Message or file behind it, where it has one."""
    peer: str | None = None
    """The other end of a pair."""
    p95: float | None = None
    """95th percentile of the repetitions, where `value` is their median."""


class Problem(Frozen):
    """Something that could not be measured, or was measured to be wrong."""

    gate: str
    """What it belongs to."""
    error: str
    """What was seen."""


class RankRecord(Frozen):
    """What one process leaves of one stage: `rank-00003.json`, renewed before and after every measurement."""

    rank: int
    world_size: int
    node: int
    """Number of its node, as in the names of the logs."""
    process: int
    """Its number among the processes of its node."""
    host: str
    doing: str
    """What it was doing last; `done` at the end."""
    step: int
    """How many measurements it has begun."""
    scheduler_node: str | None = None
    """What Slurm or Kubernetes calls its node; None: no scheduler told."""
    facts: dict[str, Any] = Field(default_factory=dict)
    figures: tuple[Figure, ...] = ()
    problems: tuple[Problem, ...] = ()


OutcomeState = Literal["done", "failed", "error", "skipped", "yielded"]


class VariantOutcome(Frozen):
    """How the job of one variant of a stage ended."""

    name: str
    """`ring`, `rail mlx5_3`."""
    state: OutcomeState
    error: str = ""


class StageOutcome(Frozen):
    """How the jobs of a stage ended."""

    stage: str
    state: OutcomeState
    """`failed`: ranks did. `error`: the pool could not run it. `yielded`: the pool was taken and the check gave way."""
    error: str = ""
    """Why it failed or was skipped."""
    culprit_ranks: tuple[int, ...] = ()
    """Ranks that are to blame, as far as what they left tells."""
    culprit_nodes: tuple[int, ...] = ()
    """Nodes that never came."""
    is_own_error: bool = False
    """It failed by an error of the program, its settings or a limit, and so of no node, whoever met it first."""
    variants: tuple[VariantOutcome, ...] = ()
    """Of collectives: what was measured again with other settings of NCCL's."""
    seconds: float = 0.0


class Status(StrEnum):
    """Of a gate and of a check. Only PASS and WARN are good enough."""

    PASS = "PASS"  # noqa: S105 - a verdict
    WARN = "WARN"
    FAIL = "FAIL"
    ERROR = "ERROR"
    """Could not be judged, for a reason that is not the cluster's."""
    SKIP = "SKIP"


BAD_END_STATES = {Status.FAIL: "CheckFail", Status.ERROR: "CheckError"}
"""Names of the states in which a check's flow run ends; automations go by them."""

Layer = Literal["presence", "correctness", "equality", "floor", "fleet", "history", "limit"]


class Finding(Frozen):
    """One gate's verdict."""

    stage: str
    gate: str
    """The figure's name, or what was compared."""
    status: Status
    layer: Layer
    """What decided: the figure is there, the result is right, all nodes are equal, the physical floor, the fleet's median,
    the cluster's own history, or a limit of the settings."""
    size_bytes: int | None = None
    value: float | None = None
    """The worst that was seen."""
    limit: float | None = None
    culprits: tuple[str, ...] = ()
    """GPUs, nodes or links, most suspect first."""
    detail: str = ""
    action: str = ""
    """What to do next."""


class Placed(Frozen):
    """A figure and where it was measured."""

    stage: str
    place: str
    """`node1`, `node1/gpu3`, `all`."""
    figure: Figure


class Suspect(Frozen):
    """Who is to blame for what does not pass."""

    place: str
    gates: tuple[str, ...]
    action: str


class NodeAction(Frozen):
    """One node that is taken out of use, or would be."""

    node: str
    """As the scheduler calls it."""
    state: Literal["planned", "done", "already", "failed"]
    """`planned`: a dry run. `already`: it was out of use before, and nothing was done."""
    what: str
    """The command on Slurm, the taint on Kubernetes, exactly."""
    undo: str
    """The command that puts it back to use."""
    undone_by: str
    """Who may do that."""
    detail: str = ""
    """Since when and why it was out of use already; or why it could not be done."""


class Reaction(Frozen):
    """What was done to the nodes that the verdict accuses."""

    mode: Literal["dry_run", "drain"]
    actions: tuple[NodeAction, ...] = ()
    left_alone: tuple[str, ...] = ()
    """Whom the verdict names and why nothing is done to it."""


class NodeFacts(Frozen):
    """One node of the report's table."""

    name: str
    host: str
    devices: tuple[str, ...]
    facts: dict[str, Any]


class Report(Frozen):
    """A check, whole."""

    schema_version: int = SCHEMA_VERSION
    run: str
    cluster: str
    started: str
    """ISO 8601, UTC."""
    seconds: float
    status: Status
    statement: str
    injected: str | None = None
    """The fault that the check did to itself."""
    chip: str
    node_fabric: str
    cluster_fabric: str
    fingerprint: str
    """Of hardware and software: only runs with the same are compared."""
    num_history: int
    """Earlier runs that the figures were compared with."""
    nodes: tuple[NodeFacts, ...]
    stages: tuple[StageOutcome, ...]
    findings: tuple[Finding, ...]
    suspects: tuple[Suspect, ...]
    figures: tuple[Placed, ...]
    notes: tuple[str, ...] = ()
    """What is not known, and why."""
    reaction: Reaction | None = None
    """None: none was asked for."""
