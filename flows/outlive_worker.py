"""A flow run that goes on when the worker which started it dies."""

import os
import select
import threading

import prefect.runtime.deployment
from rich.console import Console

OUTPUTS = (1, 2)
"""File descriptors of what a program prints, and prints as errors."""


def outlive_worker() -> None:
    """Nobody reads what a run prints once its worker is dead; it then prints to nobody, and its log goes on to the server.

    Prefect prints its log through rich, whose answer to a pipe without a reader is to end the program: a worker killed in the
    middle of a training took the training with it. Other writers would fail with the same error, so that the pipes are watched
    as well. On a command line (``... | head``) everything stays as it is.
    """
    if prefect.runtime.deployment.id:
        Console.on_broken_pipe = _print_to_nobody  # type: ignore[method-assign, assignment]
        threading.Thread(target=_watch, name="outlive-worker", daemon=True).start()


def _watch() -> None:
    poll = select.poll()
    for output in OUTPUTS:
        # Nothing is asked for: that the reader is gone is told all the same.
        poll.register(output, 0)
    poll.poll()
    _print_to_nobody()


def _print_to_nobody(console: Console | None = None) -> None:
    nobody = os.open(os.devnull, os.O_WRONLY)
    for output in OUTPUTS:
        os.dup2(nobody, output)
    os.close(nobody)
