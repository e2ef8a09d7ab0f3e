"""A flow run whose worker is dead, so that nobody reads what it prints."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import logging, sys, time
from prefect.logging.handlers import PrefectConsoleHandler
from flows.outlive_worker import outlive_worker

outlive_worker()
logger = logging.getLogger("run")
logger.addHandler(PrefectConsoleHandler())
logger.warning("reads")
sys.stdin.readline()
if sys.argv[1] == "print":
    # The pipe is watched from a thread.
    time.sleep(1)
    print("printed", flush=True)
for number in range(3):
    logger.warning("step %d", number)
    print("printed", flush=True)
    print("printed as an error", file=sys.stderr, flush=True)
"""


@pytest.mark.parametrize("first", ["log", "print"])
@pytest.mark.parametrize("deployment", ["5e28c501-4238-410e-a7b5-2fabbeda8e25", None])
def test_a_deployed_run_goes_on_without_its_worker_and_a_command_ends_as_commands_do(deployment, first):
    environment = os.environ | ({"PREFECT__RUNTIME__DEPLOYMENT__ID": deployment} if deployment else {})
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, first],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert b"reads" in process.stdout.readline()
    process.stdout.close()
    process.stdin.write(b"go on\n")
    process.stdin.close()
    assert (process.wait(60) == 0) == (deployment is not None)
