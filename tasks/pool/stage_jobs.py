"""The job of each stage: a pure function of the settings and of where the run's files lie."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasks.contracts.cluster_settings import ClusterCheck
from tasks.contracts.job import JobSpec
from tasks.contracts.run_folder import RunFolder
from tasks.contracts.settings import Experiment
from tasks.pool.backends import UsesPool

OUR_PACKAGE = str(Path(__file__).resolve().parents[2])


def dataset_job(experiment: Experiment, folder: RunFolder, *, output: str) -> JobSpec:
    """Rows to tokens, in processes of its own on one node's processors."""
    arguments = {
        "model": experiment.model.model_dump(mode="json"),
        "dataset": experiment.dataset.model_dump(mode="json"),
        "storage": experiment.storage.shared,
        "output": output,
    }
    return _job(experiment, folder, "prepare_dataset", "tasks.dataset", arguments, is_wide=False)


def inference_job(
    experiment: Experiment, folder: RunFolder, which: str, *, dataset: str, adapter: str | None, output: str
) -> JobSpec:
    """Every test request put to one model by all ranks of the pool; the champion is asked no public benchmark."""
    inference = experiment.inference.model_dump(mode="json") | ({"suites": []} if which == "champion" else {})
    arguments = {
        "model": experiment.model.model_dump(mode="json"),
        "inference": inference,
        "storage": experiment.storage.shared,
        "dataset": dataset,
        "adapter": adapter,
        "output": output,
    }
    stage = f"run_inference_{which}"
    return _job(experiment, folder, stage, "tasks.inference", arguments, fallbacks=_fewer_nodes(experiment))


def training_job(experiment: Experiment, folder: RunFolder, *, dataset: str) -> JobSpec:
    """LoRA training by all ranks of the pool; with fewer nodes only where they divide the global batch."""
    arguments = {
        "model": experiment.model.model_dump(mode="json"),
        "training": experiment.training.model_dump(mode="json"),
        "storage": experiment.storage.shared,
        "dataset": dataset,
        "output": str(folder.training),
    }
    width, batch = experiment.pool.processes_per_node, experiment.training.global_batch_size
    wanted = experiment.training.per_device_batch_size
    share = 1 if wanted == "auto" else wanted
    fallbacks = tuple(
        nodes
        for nodes in _fewer_nodes(experiment)
        if batch % (nodes * width) == 0 and batch // (nodes * width) % share == 0
    )
    return _job(experiment, folder, "train_adapter", "tasks.training", arguments, fallbacks=fallbacks)


def probe_job(check: ClusterCheck, folder: RunFolder, stage: str) -> JobSpec:
    """The probes of one stage of a cluster check, by all ranks of the pool."""
    arguments = {
        "stage": stage,
        "check": check.model_dump(mode="json"),
        "shared": check.storage.shared,
        "scratch": check.storage.scratch or tempfile.gettempdir(),
    }
    if stage != "training_inputs":
        return _job(check, folder, stage, "tasks.cluster", arguments)
    # Eight billion random numbers took one processor about a minute.
    return replace(_job(check, folder, stage, "tasks.cluster", arguments, is_wide=False), gpus=check.pool.gpus)


def variant_probe_job(check: ClusterCheck, folder: RunFolder, name: str, variant: Mapping[str, Any]) -> JobSpec:
    """The collectives again, as ``variant`` tells the ranks; beside the stage's own job."""
    job = probe_job(check, folder, "collectives")
    return _job(check, folder, name, job.module, {**job.arguments, "variant": dict(variant)})


def training_probe_job(
    check: ClusterCheck,
    folder: RunFolder,
    run: str,
    *,
    inputs: Mapping[str, Any],
    num_nodes: int,
    processes_per_node: int,
) -> JobSpec:
    """The real training program on a fixed shape, over some of the pool.

    Args:
        inputs: ``model``, ``dataset``, ``training``: what the program is told.
    """
    arguments = {**inputs, "storage": check.storage.shared, "output": str(folder.root / "training" / run)}
    job = _job(check, folder, f"training_{run}", "tasks.training", arguments)
    # A rank by itself must not compute with the processors of those that are left out: it is held against them.
    threads = str(max(1, (os.cpu_count() or 1) // check.pool.world_size))
    is_emulated = check.pool.backend == "local" and not check.pool.gpus
    env = {**job.env, "OMP_NUM_THREADS": threads} if is_emulated else job.env
    return replace(job, num_nodes=num_nodes, processes_per_node=processes_per_node, env=env)


def _fewer_nodes(experiment: Experiment) -> tuple[int, ...]:
    """The numbers of nodes with which a job may go on when one is lost, most first."""
    pool = experiment.pool
    return () if pool.min_num_nodes is None else tuple(range(pool.num_nodes - 1, pool.min_num_nodes - 1, -1))


def _job(
    settings: UsesPool,
    folder: RunFolder,
    stage: str,
    module: str,
    arguments: Mapping[str, Any],
    *,
    is_wide: bool = True,
    fallbacks: tuple[int, ...] = (),
) -> JobSpec:
    """The job of a stage: over the whole pool, or, where ``is_wide`` is off, one process without a GPU."""
    pool, storage = settings.pool, settings.storage
    env = {
        # Ranks run wherever the pool starts them; our code is where this file is.
        "PYTHONPATH": os.pathsep.join(filter(None, [OUR_PACKAGE, os.environ.get("PYTHONPATH", "")])),
    }
    if storage.scratch:
        env["TMPDIR"] = storage.scratch
    return JobSpec(
        name=f"{folder.run}-{stage}".replace("_", "-").lower(),
        module=module,
        arguments=dict(arguments),
        folder=str(folder.job(stage)),
        log_folder=folder.job_logs(stage),
        num_nodes=pool.num_nodes if is_wide else 1,
        fallback_num_nodes=fallbacks,
        processes_per_node=pool.processes_per_node if is_wide else 1,
        gpus=pool.gpus and is_wide,
        env=env,
        time_limit_s=pool.time_limit_minutes * 60,
        queue_limit_s=_seconds(pool.queue_limit_minutes),
        start_limit_s=_seconds(pool.start_limit_minutes),
        replacement_limit_s=pool.replacement_limit_minutes * 60,
    )


def _seconds(minutes: float | None) -> float | None:
    return None if minutes is None else minutes * 60
