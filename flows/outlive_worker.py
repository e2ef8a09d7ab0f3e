"""A flow run that goes on when the worker which started it dies."""

import os

import prefect.runtime.deployment
from rich.console import Console


def outlive_worker() -> None:
    """Nobody reads what a run prints once its worker is dead; it then prints to nobody, and its log goes on to the server.

    Prefect prints its log through rich, whose answer to a pipe without a reader is to end the program: a worker killed in the
    middle of a training took the training with it. On a command line (``... | head``) that answer stays.
    """
    if prefect.runtime.deployment.id:
        Console.on_broken_pipe = _print_to_nobody  # type: ignore[method-assign, assignment]


def _print_to_nobody(console: Console) -> None:
    nobody = os.open(os.devnull, os.O_WRONLY)
    for printed in (1, 2):
        os.dup2(nobody, printed)
    os.close(nobody)
