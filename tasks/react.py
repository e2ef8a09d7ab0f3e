"""From an accusation to what is done: the one place where a check changes anything in the cluster, and only if it is told to."""

from prefect.logging import get_run_logger

from tasks.cluster.evidence import Evidence
from tasks.cluster.reaction import accusation, reaction_told, told
from tasks.contracts.cluster_report import NodeAction, Reaction, Report
from tasks.pool.out_of_use import planned, take_out


def react(evidence: Evidence, report: Report) -> Report:
    """The report with what was done to the nodes that it accuses, or would be; as it was where no reaction is asked for.

    What cannot be done is told as loudly as the verdict and changes none: the node is as bad as before.
    """
    mode = evidence.check.reaction.mode
    if mode == "none":
        return report
    logger, pool = get_run_logger(), evidence.check.pool
    accused = accusation(evidence, report.findings)
    left_alone = list(accused.left_alone)
    actions: list[NodeAction] = []
    for node, gates in accused.nodes.items():
        try:
            plan = planned(pool, node, report.run, gates)
        except ValueError as error:
            left_alone.append(str(error))
            continue
        action = plan if mode == "dry_run" else take_out(pool, plan, report.run, gates)
        (logger.error if action.state == "failed" else logger.warning)("%s", told(action))
        actions.append(action)
    for why in left_alone:
        logger.info("nothing is done to %s", why)
    reaction = Reaction(mode=mode, actions=tuple(actions), left_alone=tuple(left_alone))
    words = reaction_told(reaction)
    statement = f"{report.statement} Reaction: {words}." if words else report.statement
    return report.model_copy(update={"reaction": reaction, "statement": statement})
