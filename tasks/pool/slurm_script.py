"""The sbatch script of a job: a pure function of the job, its attempt's folder and the cluster's settings."""

import math
import re
import shlex
import sys
from pathlib import Path

from tasks.contracts.attempt import BEGUN
from tasks.contracts.job import LEFT_EXIT_CODE, STARTS, JobSpec
from tasks.contracts.pool_settings import NetworkProfile, SlurmSettings
from tasks.pool.launch import Rendezvous, agent_command
from tasks.pool.network import network_environment
from tasks.pool.torchrun_files import FAILURES

PORTS = 20_000, 10_000
"""First port of the rendezvous, and how many: which one follows from the job's number, so that jobs on a node differ."""
MARK = "proving-ground"
LAST_NODES_LIMIT_S = 60
"""From the first node's end to that of the others, who may hang in a collective that will never come about."""


def comment(job: JobSpec, attempt: Path, token: str) -> str:
    """By which the job is found again where its number was lost."""
    return f"{MARK}:{job.name}:{attempt.name}:{token}"


def sbatch_script(
    job: JobSpec, attempt: Path, token: str, slurm: SlurmSettings, network: NetworkProfile = "auto"
) -> str:
    """The whole script.

    Args:
        attempt: the attempt's folder.
        token: tells this attempt from those of that name in other storage folders.

    Raises:
        ValueError: a name or a path cannot stand in it.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", job.name):
        raise ValueError(f"{job.name!r} is no name for a job: letters, digits, '.', '_' and '-' only")
    return (
        "\n".join(["#!/bin/bash", *_directives(job, attempt, token, slurm), "", *_body(job, attempt, slurm, network)])
        + "\n"
    )


def _directives(job: JobSpec, attempt: Path, token: str, slurm: SlurmSettings) -> list[str]:
    wanted: dict[str, object] = {
        "job-name": job.name,
        "comment": comment(job, attempt, token),
        "nodes": job.num_nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.processes_per_node if job.gpus else None,
        "cpus-per-task": slurm.cpus_per_node,
        "mem": slurm.memory_per_node_gbytes and f"{slurm.memory_per_node_gbytes}G",
        "time": max(1, math.ceil(job.time_limit_s / 60)),
        "output": attempt / "slurm.log",
        "open-mode": "append",
        "export": ",".join(["PATH", "HOME", "USER", "LANG", *slurm.forward_env]),
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "reservation": slurm.reservation,
        # To the ranks, through srun, not to this script (which B: would mean).
        "signal": slurm.leave_before_end_s and f"USR1@{slurm.leave_before_end_s}",
    }
    lines = [f"--{name}={_directive_value(value)}" for name, value in wanted.items() if value is not None]
    lines += ["--requeue" if slurm.requeue else "--no-requeue", *(["--exclusive"] if slurm.exclusive else [])]
    return [f"#SBATCH {line}" for line in [*lines, *slurm.directives]]


def _directive_value(value: object) -> str:
    text = str(value)
    if "\n" in text or '"' in text:
        raise ValueError(f"{text!r} cannot stand in a line of sbatch: it contains a line break or a quote")
    return f'"{text}"' if " " in text else text


def _body(job: JobSpec, attempt: Path, slurm: SlurmSettings, network: NetworkProfile) -> list[str]:
    first_port, num_ports = PORTS
    folder = shlex.quote(str(attempt))
    threads = max(1, (slurm.cpus_per_node or 1) // job.processes_per_node)
    env = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads)}
    if not job.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ""
    env |= network_environment(network)
    # The shell fills these two in; everything else is quoted.
    rendezvous = Rendezvous("$address", "$port", f"{job.name}-{attempt.name}-$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}")
    command = agent_command(
        job,
        rendezvous,
        spec=str(attempt / "spec.json"),
        failures=str(attempt / FAILURES),
        python=slurm.python or sys.executable,
    )
    # A node that is done with its ranks waits for the others', who may still be saving or telling their own errors.
    srun = [
        "srun",
        # Else srun takes sbatch's list for its own, and the ranks get nothing of what is exported here; nor, since 22.05,
        # the processors.
        "--export=ALL",
        *([f"--cpus-per-task={slurm.cpus_per_node}"] if slurm.cpus_per_node else []),
        "--kill-on-bad-exit=0",
        f"--wait={LAST_NODES_LIMIT_S}",
        f"--output={attempt}/node-%n.log",
        "--open-mode=append",
    ]
    if slurm.container_image:
        mounts = ",".join(slurm.container_mounts)
        srun += [f"--container-image={slurm.container_image}", *([f"--container-mounts={mounts}"] if mounts else [])]
    return [
        "# A requeued job runs this again: what its former life left must not be taken for this one's.",
        f"rm -f {folder}/exit.json {folder}/{BEGUN} {folder}/node-*.failures.json {folder}/node-*.host",
        f"date +%s >> {folder}/{STARTS}",
        "",
        *[f"export {name}={shlex.quote(value)}" for name, value in (env | dict(job.env) | slurm.env).items()],
        *slurm.setup,
        "",
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        'address=$(scontrol show node "$head" | sed -n "s/.*NodeAddr=\\([^ ]*\\).*/\\1/p")',
        f"port=$(({first_port} + SLURM_JOB_ID % {num_ports}))",
        "",
        " \\\n  ".join(_shell_word(word) for word in [*srun, *command]),
        "code=$?",
        "",
        "reason=",
        'case "$code" in',
        "  0) state=succeeded ;;",
        f'  {LEFT_EXIT_CODE}) state=preempted reason="the ranks were told to leave, and left" ;;',
        "  *) state=failed ;;",
        "esac",
        """printf '{"state": "%s", "reason": "%s", "exit_code": %d}\\n' "$state" "$reason" "$code" \\""",
        f"  > {folder}/.exit.json",
        f"mv {folder}/.exit.json {folder}/exit.json",
        'exit "$code"',
    ]


def _shell_word(word: str) -> str:
    """Quoted for the shell; one that the shell has to fill in stands in double quotes."""
    if "$address" in word or "$SLURM_JOB_ID" in word:
        return f'"{word}"'
    return shlex.quote(word)
