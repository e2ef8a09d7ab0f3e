"""A flow in this process, recorded in the servers that there are, or in its own two for its time."""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State
from prefect.events.worker import EventsWorker
from prefect.exceptions import TerminationSignal
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.local_stack import configured_stack, running_stack, temporary_stack

STATED_BY = "deployments/prefect.yaml"
INTERRUPTED = 130
RunFlow = Callable[[Callable[[], Any]], State]


class Interruption(RuntimeError):
    """The person, or a SIGTERM, ended it."""


def command_line(program: str, text: str | None, deployments: str, *, again: str = "") -> argparse.Namespace:
    """The deployment whose values are used, assignments that change some (``set``), and the run's name (``run``).

    Args:
        again: what the same name a second time does.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("deployment", help=f"whose values to use: {deployments} ({STATED_BY})")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change one setting; repeatable"
    )
    parser.add_argument("--run", help=f"name of the run and its folder{again} (default: by time)")
    return parser.parse_args()


@contextmanager
def in_process(storage: Path) -> Iterator[RunFlow]:
    """What runs a flow; servers that had to be started live as long as the block.

    Raises:
        StackError: no server could be started or used.
        Interruption: the flow was interrupted.
    """
    with ExitStack() as stack:
        addresses = configured_stack() or running_stack()
        if addresses is None:
            print("starting Prefect and MLflow for this run (none are running; 'make ui' keeps them)", flush=True)
            try:
                addresses = stack.enter_context(temporary_stack(storage))
            except KeyboardInterrupt as error:
                raise Interruption("interrupted before anything was started") from error
        os.environ.update(addresses.environment())

        def run(flow: Callable[[], Any]) -> State:
            with temporary_settings({PREFECT_API_URL: addresses.prefect_api}):
                try:
                    state: State = flow()
                except (KeyboardInterrupt, TerminationSignal) as error:
                    # A SIGTERM: Prefect takes it over while a flow runs, and passes it on.
                    raise Interruption("interrupted") from error
                # Logs and events travel in the background; the servers may be ours and about to stop.
                APILogWorker.drain_all(timeout=10)
                EventsWorker.drain_all(timeout=10)
            return state

        yield run
