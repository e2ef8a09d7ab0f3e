"""Settings of the GPU pool: which scheduler, how wide, and what each scheduler must be told."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from tasks.contracts.environment import EnvName, refuse_secrets, refuse_secrets_in_lines
from tasks.contracts.frozen_settings import Settings
from tasks.contracts.kubernetes_settings import KubernetesSettings

Word = Annotated[str, Field(pattern=r"^[^\s\"'`$\\]+$")]
"""What stands in a directive as it is: no white space, quote or shell sign."""
Line = Annotated[str, Field(pattern=r"^[^\r\n\x00]+$")]


Backend = Literal["local", "slurm", "kubernetes"]
EXPORT_INSTEAD = "export them where the flow runs and name them in pool.slurm.forward_env"


class SlurmSettings(Settings):
    """Where on a Slurm cluster (and so on Soperator) jobs run. Empty: the cluster's default."""

    partition: Word | None = None
    """Partition, or several with commas between them."""
    account: Word | None = None
    """Account that is charged."""
    qos: Word | None = None
    """Quality of service."""
    constraint: Word | None = None
    """Features that the nodes must have."""
    reservation: Word | None = None
    """Reservation to run in."""
    cpus_per_node: int | None = Field(default=None, ge=1)
    """Processors of each node for the job."""
    memory_per_node_gbytes: int | None = Field(default=None, ge=1)
    """Memory of each node for the job (1 GB = 2^30 bytes, as Slurm counts); 0 of Slurm, all, is `exclusive`."""
    exclusive: bool = False
    """Whole nodes, nobody else on them."""
    requeue: bool = True
    """Slurm starts the job again when it was preempted or lost a node; it goes on from its newest checkpoint."""
    leave_before_end_s: int | None = Field(default=None, ge=30, le=3600)
    """So long before its time limit a job is told to leave: it saves, leaves, and goes on in another job, for runs that are
    longer than the partition allows. Empty: the time limit is the end."""
    directives: tuple[Line, ...] = ()
    """Further lines for sbatch without `#SBATCH`, as `--mail-type=FAIL`."""
    setup: tuple[Line, ...] = ()
    """Lines of shell before the job starts, as `module load cuda/12.8`."""
    python: Line | None = None
    """Interpreter with this project's packages, where the nodes see it; empty: the path of the one that submits."""
    container_image: Line | None = None
    """Image or .sqsh file in which the ranks run (Pyxis and Enroot); `python` is then a path inside it."""
    container_mounts: tuple[Word, ...] = ()
    """Mounts into the container, as `/shared:/shared`; the storage folders must be among them."""
    env: dict[EnvName, str] = Field(default_factory=dict)
    """Environment of the ranks, as `NCCL_IB_HCA: mlx5`; never a secret."""
    forward_env: tuple[EnvName, ...] = (
        "HF_TOKEN", "HF_HOME", "HF_HUB_OFFLINE",
    )  # fmt: skip
    """Variables of the submitting process that the ranks get; of all others only PATH, HOME, USER and LANG travel. What Slurm
    itself sets, and the user's login environment on the first node, come on top."""

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        refuse_secrets(value, EXPORT_INSTEAD)
        return value

    @field_validator("setup", "directives")
    @classmethod
    def _no_secrets_in_lines(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        refuse_secrets_in_lines(value, EXPORT_INSTEAD)
        return value


class LocalSettings(Settings):
    """How jobs share this machine."""

    share_gpus: bool = False
    """Let jobs run on GPUs that other jobs are using. Off: each GPU has one job, and others wait for it."""


NetworkProfile = Literal["auto", "infiniband", "roce", "ethernet"]


class PoolSettings(Settings):
    """Where the jobs run and how wide."""

    backend: Backend = "local"
    """`local`: torchrun agents on this machine, one per emulated node. `slurm`: sbatch and srun, from a machine that has
    Slurm's commands and the shared folder. `kubernetes`: an Indexed Job, from wherever the API and the shared folder are seen."""
    num_nodes: int = Field(default=1, ge=1, le=1024)
    """Nodes of a training or inference job."""
    processes_per_node: int = Field(default=1, ge=1, le=64)
    """Ranks per node: one per GPU, or CPU processes where `gpus` is off."""
    gpus: bool = True
    """One GPU per rank; off: ranks compute on the CPU."""
    min_num_nodes: int | None = Field(default=None, ge=1)
    """Once a node was lost and no other came in `replacement_limit_minutes`, a job goes on with fewer nodes, not less
    than these; empty: it waits for as many as before."""
    time_limit_minutes: float = Field(default=240, gt=0)
    """A job that runs longer is ended and reported as failed."""
    queue_limit_minutes: float | None = Field(default=None, gt=0)
    """A job that waits longer for its turn is withdrawn and reported as failed; empty: it waits as long as it takes."""
    start_limit_minutes: float | None = Field(default=20, gt=0)
    """A job whose ranks have not all met so long after its turn came is ended, and the nodes that are missing are named."""
    replacement_limit_minutes: float = Field(default=15, gt=0)
    """How long a job that lost a node waits for another before it goes on with fewer (`min_num_nodes`)."""
    max_retries: int = Field(default=2, ge=0, le=20)
    """Further attempts after a network, a device or a process gave way; each goes on from the newest checkpoint. Errors of
    the program are not tried again, and what was preempted or lost a node goes on without being counted."""
    network: NetworkProfile = "auto"
    """Environment of the ranks for the network between nodes: `auto` leaves NCCL's own choice; the others fix it, so that
    a missing fabric fails instead of being slow."""
    local: LocalSettings = LocalSettings()
    slurm: SlurmSettings = SlurmSettings()
    kubernetes: KubernetesSettings = KubernetesSettings()

    @model_validator(mode="after")
    def _fewest(self) -> Self:
        if self.min_num_nodes is not None and self.min_num_nodes > self.num_nodes:
            raise ValueError(
                f"min_num_nodes={self.min_num_nodes} is more than num_nodes={self.num_nodes}; use at most that"
            )
        return self

    @property
    def world_size(self) -> int:
        """Ranks over all nodes."""
        return self.num_nodes * self.processes_per_node
