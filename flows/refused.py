"""What to do about a deployment whose values no longer fit the code: the run fails before it begins, with the setting's name."""

from typing import Any

from prefect.client.schemas.objects import FlowRun, State
from prefect.logging.loggers import flow_run_logger

SIGNS = ("ParameterTypeError", "SignatureMismatchError", "ParameterBindError")
"""In the state's message; Prefect raises them before the flow's first line."""


def tell_next_step(flow: Any, flow_run: FlowRun, state: State) -> None:
    """Hook of a failed flow run: a line in its log where its parameters were refused. Prefect calls it by these names."""
    if not any(sign in (state.message or "") for sign in SIGNS):
        return
    if flow_run.deployment_id is None:
        step = "give parameters that fit, as deployments/prefect.yaml has them"
    else:
        step = (
            "the deployment on the server is of other code than its worker's. 'make deploy DRY_RUN=1' (with the site's SITE=) "
            "shows the difference, 'make deploy' removes it; then start the run again"
        )
    flow_run_logger(flow_run, flow).error("nothing was started: %s: %s", state.message, step)
