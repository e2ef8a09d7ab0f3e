"""Slurm's own commands: lists of arguments, never a line for a shell."""

import os
import subprocess

from tasks.contracts.job import PoolError, SchedulerAway

COMMAND_LIMIT_S = 60
_SETTINGS = ("SBATCH_", "SQUEUE_", "SCANCEL_", "SLURM_", "SINFO_", "SCONTROL_")
_AWAY = ("unable to contact slurm controller", "socket timed out", "connection refused", "zero bytes were transmitted",
         "communication connection failure", "unable to connect to slurm", "slurm backup controller in standby mode")  # fmt: skip
"""What Slurm's commands say when they could not ask, rather than when they were refused."""


def slurm(command: str, *arguments: str) -> str:
    """The output of one of Slurm's commands.

    Raises:
        PoolError: it is not there, does not answer, or refuses; quoted.
    """
    try:
        done = subprocess.run(
            [command, *arguments],
            capture_output=True,
            text=True,
            # Whatever an administrator wrote into a reason, in whatever encoding, is no reason to fail.
            errors="replace",
            timeout=COMMAND_LIMIT_S,
            # Settings of the caller's shell (SBATCH_PARTITION, SQUEUE_FORMAT) would change what is asked.
            env={k: v for k, v in os.environ.items() if not k.startswith(_SETTINGS)}
            | {k: v for k, v in os.environ.items() if k in ("SLURM_CONF", "SLURM_CLUSTERS")},
        )
    except FileNotFoundError as error:
        raise PoolError(
            f"{command} not found: run this on a machine with Slurm's commands (a login node), or set pool.backend=local"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SchedulerAway(
            f"{command} did not answer in {COMMAND_LIMIT_S} s; is the controller up? (scontrol ping)"
        ) from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
        is_away = any(sign in said.lower() for sign in _AWAY)
        raise (SchedulerAway if is_away else PoolError)(f"{command}: {said}")
    return done.stdout
