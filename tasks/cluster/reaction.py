"""Which nodes a verdict accuses so plainly that they may be taken out of use; a pure function, which takes none."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tasks.cluster.evidence import Evidence
from tasks.cluster.pairs import node_of
from tasks.contracts.cluster_report import Finding, NodeAction, Reaction, Status
from tasks.contracts.cluster_settings import ReactionSettings

STATES = {
    "planned": "would be taken out of use",
    "done": "is out of use now",
    "already": "was out of use already",
    "failed": "could NOT be taken out of use",
}


@dataclass(frozen=True)
class Accusation:
    """Whom the FAILs of a check accuse.

    Attributes:
        nodes: the gates that each node failed, by the scheduler's name of the node.
        left_alone: whom else they name, and why nothing may be done to it.
    """

    nodes: Mapping[str, Sequence[str]]
    left_alone: Sequence[str]


def accusation(evidence: Evidence, findings: Sequence[Finding]) -> Accusation:
    """Nodes named by a FAIL, if there are few of them. WARN and ERROR accuse nobody, nor does what lies between nodes.

    A gate that names every node accuses none: of two that differ either may be right, and what they share may be to blame.
    """
    gates: dict[str, dict[str, None]] = defaultdict(dict)
    left_alone: dict[str, None] = {}
    num_nodes = evidence.check.pool.num_nodes
    for finding in findings:
        if finding.status is not Status.FAIL:
            continue
        gate = f"{finding.stage}/{finding.gate}"
        outcome = evidence.outcomes.get(finding.stage)
        if finding.gate == "finished" and outcome is not None and outcome.is_own_error:
            left_alone[f"{gate}: the program's own error, or a limit of its settings, is of no node"] = None
            continue
        named = dict.fromkeys(node_of(culprit) for culprit in finding.culprits)
        known = [node for node in named if node in evidence.scheduler_nodes]
        if num_nodes > 1 and len(known) >= num_nodes:
            left_alone[f"{gate}: names all {num_nodes} nodes, of which it cannot tell which is at fault"] = None
            continue
        for node in known:
            gates[node][gate] = None
        for place in finding.culprits:
            if node_of(place) not in evidence.scheduler_nodes:
                left_alone[f"{place} ({gate}): is no node that the scheduler knows"] = None
    limit = most_nodes(evidence.check.reaction, num_nodes)
    if len(gates) > limit:
        left_alone[
            f"{', '.join(sorted(gates))}: {len(gates)} nodes are accused and at most {limit} may be taken out of use by one "
            "check (reaction.max_nodes, reaction.max_share); look at what they have in common first"
        ] = None
        gates.clear()
    return Accusation({node: tuple(own) for node, own in gates.items()}, tuple(left_alone))


def most_nodes(settings: ReactionSettings, num_nodes: int) -> int:
    """How many nodes one check may take out of use."""
    # 0.29 x 100 is 28.999999999999996.
    return min(settings.max_nodes, max(1, math.floor(settings.max_share * num_nodes + 1e-9)))


def told(action: NodeAction) -> str:
    """One action in a sentence, with what undoes it."""
    why = f" ({action.detail})" if action.detail else ""
    if action.state == "already":
        return f"{action.node} {STATES[action.state]}{why}"
    undo = f"; undo: {action.undo}" if action.state in ("planned", "done") else ""
    return f"{action.node} {STATES[action.state]}{why}: {action.what}{undo}"


def reaction_told(reaction: Reaction | None) -> str:
    """The whole in a few words, for a statement or a tag; empty where none was asked for, or there was nobody to react to."""
    if reaction is None:
        return ""
    parts = []
    for state, words in STATES.items():
        nodes = [action.node for action in reaction.actions if action.state == state]
        parts += [f"{', '.join(nodes)} {words}"] * bool(nodes)
    if not parts and reaction.left_alone:
        parts = ["no node is taken out of use"]
    return "; ".join(parts)
