"""Take one node out of use on the pool's scheduler: first the plan, exactly, then the deed."""

import json
import shlex
from collections.abc import Sequence

from tasks.contracts.cluster_report import NodeAction
from tasks.contracts.job import PoolError
from tasks.contracts.pool_settings import PoolSettings
from tasks.pool import kubernetes_nodes, slurm_nodes
from tasks.pool.kubernetes_api import open_api


def planned(pool: PoolSettings, node: str, run: str, gates: Sequence[str]) -> NodeAction:
    """What would be done; nothing is asked of the scheduler.

    Raises:
        ValueError: that is no name of one node, or the pool has no scheduler.
    """
    if pool.backend == "slurm":
        what, undo = slurm_nodes.drain_command(node, reason_of(run, gates)), slurm_nodes.resume_command(node)
        return NodeAction(
            node=node, state="planned", what=shlex.join(what), undo=shlex.join(undo), undone_by=slurm_nodes.WHO_MAY
        )
    if pool.backend == "kubernetes":
        undo, taint = kubernetes_nodes.untaint_command(node), kubernetes_nodes.taint_of(run)
        return NodeAction(
            node=node, state="planned", what=f"taint {json.dumps(taint)}", undo=shlex.join(undo),
            undone_by=kubernetes_nodes.WHO_MAY,
        )  # fmt: skip
    raise ValueError(f"{node}: pool.backend={pool.backend} has no scheduler that could take a node out of use")


def take_out(pool: PoolSettings, plan: NodeAction, run: str, gates: Sequence[str]) -> NodeAction:
    """The plan as it was carried out. What goes wrong is in it, in the scheduler's words, and raises nothing."""
    try:
        if pool.backend == "slurm":
            before = slurm_nodes.drain(plan.node, reason_of(run, gates))
        else:
            api = open_api(pool.kubernetes.context)
            before = kubernetes_nodes.taint(api, plan.node, kubernetes_nodes.taint_of(run))
    except Exception as error:
        # Not of the scheduler's words alone: a verdict must not be lost to what became of one node.
        detail = str(error) if isinstance(error, PoolError) else f"{type(error).__name__}: {error}"
        return plan.model_copy(update={"state": "failed", "detail": detail})
    return plan.model_copy(update={"state": "done"} if before is None else {"state": "already", "detail": before})


def reason_of(run: str, gates: Sequence[str]) -> str:
    """What a person reads in the scheduler's list of drained nodes."""
    return f"proving-ground check {run}: {', '.join(gates)}"
