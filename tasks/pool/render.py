"""What a stage of a deployment would submit, as text: nothing is started, nothing is written unless asked."""

import shlex
import sys
from pathlib import Path

import yaml

from tasks.contracts.job import JobSpec
from tasks.contracts.run_folder import RunFolder
from tasks.contracts.settings import Experiment
from tasks.pool.attempts import begin_attempt, newest_attempt, submitting
from tasks.pool.kubernetes_objects import render_job, render_service
from tasks.pool.launch import Rendezvous, agent_command
from tasks.pool.slurm_script import sbatch_script
from tasks.pool.stage_jobs import dataset_job, inference_job, training_job

TOKEN = "0" * 12
"""In place of the one that each submission draws."""
NO_UID = "00000000-0000-0000-0000-000000000000"
"""In place of the Job's, which the Service belongs to and which the cluster gives it."""
BY_HAND_PORT = 29500


def job_of(experiment: Experiment, run: str, stage: str) -> JobSpec:
    """The job of a stage, with the run folder's own links where a run would name cached results."""
    folder = RunFolder(experiment.storage, run)
    dataset = str(folder.dataset)
    if stage == "prepare_dataset":
        return dataset_job(experiment, folder, output=dataset)
    if stage == "train_adapter":
        return training_job(experiment, folder, dataset=dataset)
    which = stage.removeprefix("run_inference_")
    adapter = str(folder.adapter) if which == "finetuned" else None
    return inference_job(
        experiment, folder, which, dataset=dataset, adapter=adapter, output=str(folder.inference(which))
    )


def rendered(experiment: Experiment, job: JobSpec, backend: str, *, write: bool) -> str:
    """The sbatch script, the Kubernetes objects, or each node's torchrun line.

    Args:
        write: make the attempt's folder with the spec that torchrun's lines name, to run them by hand.

    Raises:
        ValueError: ``write``, and the job has an attempt: another beside it would take its results from it.
    """
    folder = Path(job.folder)
    newest = newest_attempt(folder) if folder.exists() else None
    attempt = folder / f"{int(newest.name) + 1 if newest else 1:03d}"
    if write:
        attempt = _first_attempt(job)
    if backend == "slurm":
        return sbatch_script(job, attempt, TOKEN, experiment.pool.slurm, experiment.pool.network)
    if backend == "kubernetes":
        objects = render_job(job, attempt, TOKEN, experiment.pool.kubernetes, experiment.pool.network)
        return yaml.safe_dump_all([objects, render_service(objects, NO_UID)], sort_keys=False)
    return torchrun_lines(job, attempt)


def _first_attempt(job: JobSpec) -> Path:
    folder = Path(job.folder)
    with submitting(folder):
        if (newest := newest_attempt(folder)) is not None:
            # Ranks of one that runs would be the newest's no more; one that ended well would be run again by its flow.
            raise ValueError(f"{newest} is an attempt at this job already; choose a run of your own with --run NAME")
        return begin_attempt(job, None, None)


def torchrun_lines(job: JobSpec, attempt: Path) -> str:
    """A line for each node's shell: plain torchrun, as the pool's agents run it."""
    rendezvous = Rendezvous("HEAD", BY_HAND_PORT, f"{job.name}-by-hand")
    agent = agent_command(job, rendezvous, spec=str(attempt / "spec.json"), failures="", python=sys.executable)
    # What stands behind the file of the failures are torchrun's own options.
    options = agent[4:]
    lines = [
        f"# {job.num_nodes} nodes x {job.processes_per_node} processes. Put the first node's name or address for HEAD.",
        "# Every node needs this folder, the interpreter and the shared storage at the same paths.",
    ]
    environment = [f"export {name}={shlex.quote(value)}" for name, value in job.env.items()]
    if not job.gpus:
        environment.append("export CUDA_VISIBLE_DEVICES=''")
    command = shlex.join([sys.executable, "-m", "torch.distributed.run", *options])
    for node in range(job.num_nodes):
        lines += ["", f"# node {node}", *environment, f"NODE_RANK={node} {command}"]
    return "\n".join(lines) + "\n"
