"""Slurm's nodes: one is drained, so that nothing new starts on it. What runs there goes on."""

import re

from tasks.contracts.job import PoolError
from tasks.pool.slurm_commands import slurm

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
"""One node's: Slurm would take brackets and commas for many, and ALL for all."""
MAX_REASON_CHARACTERS = 200
WHO_MAY = "whom Slurm calls an operator or administrator (sacctmgr show user; SlurmUser and root as well)"


def drain_command(node: str, reason: str) -> list[str]:
    """What drains one node.

    Raises:
        ValueError: that is no name of one node.
    """
    return ["scontrol", "update", f"NodeName={_one(node)}", "State=DRAIN", f"Reason={_harmless(reason)}"]


def resume_command(node: str) -> list[str]:
    """What puts it back to use. Raises as :func:`drain_command` does."""
    return ["scontrol", "update", f"NodeName={_one(node)}", "State=RESUME"]


def drain(node: str, reason: str) -> str | None:
    """Drain a node; where it is drained already nothing is done, and the reason that it has is returned.

    Raises:
        PoolError: Slurm refuses, does not answer, knows no such node, or does not say afterwards that it is drained.
    """
    state, why = _state(node)
    if "drain" in state:
        # Somebody's own reason must not be written over.
        return f"{state}: {why}"
    command = drain_command(node, reason)
    try:
        slurm(*command)
    except PoolError as error:
        raise PoolError(f"{error}; draining is for {WHO_MAY}") from error
    state, _ = _state(node)
    if "drain" not in state:
        raise PoolError(
            f"scontrol reported no error, and Slurm says that {node} is {state}; see scontrol show node {node}"
        )
    return None


def _state(node: str) -> tuple[str, str]:
    told = slurm("sinfo", "--noheader", "--Node", f"--nodes={_one(node)}", "--format=%T|%E")
    # A line for each partition that it is in, all alike.
    lines = told.strip().splitlines()
    if not lines:
        raise PoolError(f"Slurm knows no node {node}; see sinfo --Node")
    state, _, why = lines[0].strip().partition("|")
    return state.lower(), why


def _one(node: str) -> str:
    if not NAME.fullmatch(node) or node.upper() == "ALL":
        raise ValueError(
            f"{node!r} is no name of one node of Slurm: letters, digits, '.', '_' and '-' only, and not ALL"
        )
    return node


def _harmless(reason: str) -> str:
    return re.sub(r"[^A-Za-z0-9 ,.:/@_-]", "_", reason)[:MAX_REASON_CHARACTERS].strip()
