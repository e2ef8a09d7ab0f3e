"""torchrun's command line: a pure function of the job and of where its nodes meet."""

import sys
from dataclasses import dataclass

from tasks.contracts.job import JobSpec


@dataclass(frozen=True)
class Rendezvous:
    """What a backend supplies: where the agents meet, under which id."""

    host: str
    port: int | str
    id: str


def agent_command(
    job: JobSpec,
    rendezvous: Rendezvous,
    *,
    spec: str,
    failures: str,
    local_addr: str | None = None,
    python: str = sys.executable,
) -> list[str]:
    """The command that every node runs: torchrun, with the node's failures recorded as JSON.

    Args:
        failures: file of the failures, with ``{node}`` for the node's rank.
        python: the interpreter on the nodes.
    """
    return [
        python,
        "-m",
        "tasks.pool.torchrun_agent",
        failures,
        f"--nnodes={job.num_nodes}",
        f"--nproc-per-node={job.processes_per_node}",
        "--max-restarts=0",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={rendezvous.host}:{rendezvous.port}",
        f"--rdzv-id={rendezvous.id}",
        *([f"--local-addr={local_addr}"] if local_addr else []),
        "--module",
        job.module,
        spec,
    ]
