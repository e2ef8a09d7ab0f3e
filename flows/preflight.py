"""What is checked before anything is submitted; everything that is wrong is reported at once."""

import os
import shutil
from pathlib import Path

from tasks.contracts.files import read_json
from tasks.contracts.job import JobSpec
from tasks.contracts.overrides import SettingsError, dotted
from tasks.contracts.run_folder import RunFolder
from tasks.contracts.settings import Experiment
from tasks.dataset.benchmarks import find_benchmark
from tasks.dataset.bfcl import find_bfcl
from tasks.dataset.sources.files import DatasetNotFound
from tasks.dataset.sources.read import check_dataset
from tasks.models.identity import ModelNotFound, check_model
from tasks.pool.backends import UsesPool
from tasks.pool.kubernetes_objects import check_reachable
from tasks.pool.local import check_gpus
from tasks.training.plan import FREE_SETTINGS, plan_training

BINDING_GROUPS = ("model.", "dataset.", "training.", "inference.")
"""Settings that decide what a run's files hold. Pool, storage and gates may change when a run is resumed."""
FREE_ON_RESUME = {f"training.{name}" for name in FREE_SETTINGS} | {"inference.batch_size"}
"""Settings among them that change how fast or in how much memory, and nothing that is learnt or asked."""


def check_experiment(experiment: Experiment, folder: RunFolder) -> None:
    """Refuse a run that cannot succeed.

    Raises:
        SettingsError: listing every reason, each with value, limit and what to do.
    """
    problems = _changed_since(folder, experiment)
    for check in (_model, _dataset, _plan, _suites, _gpus, _pods, _space):
        try:
            check(experiment)
        except (ModelNotFound, DatasetNotFound, ValueError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise SettingsError("\n".join(problems))


def _changed_since(folder: RunFolder, experiment: Experiment) -> list[str]:
    """What a resumed run would mix: its finished stages were made with the settings that it was started with."""
    if not folder.experiment.exists():
        return []
    before = dotted(read_json(folder.experiment)["experiment"])
    now = dotted(experiment.model_dump(mode="json"))
    return [
        f"{name}={now.get(name)}: run {folder.run} was started with {before.get(name)} and what it finished is kept; "
        "give that value to resume it, or another --run to start anew"
        for name in sorted(before.keys() | now.keys())
        if name.startswith(BINDING_GROUPS) and name not in FREE_ON_RESUME and before.get(name) != now.get(name)
    ]


def _model(experiment: Experiment) -> None:
    check_model(experiment.model)


def _suites(experiment: Experiment) -> None:
    if "bfcl" in experiment.inference.suites:
        find_bfcl()


def _dataset(experiment: Experiment) -> None:
    check_dataset(experiment.dataset)
    for name in experiment.dataset.benchmarks:
        find_benchmark(name)


def _plan(experiment: Experiment) -> None:
    """With the most rows that the settings allow; the stage itself checks again with the rows there are."""
    dataset = experiment.dataset
    if dataset.max_rows is None:
        return
    rows = dataset.max_rows - dataset.num_test_rows - dataset.num_unseen_tools_rows
    plan_training(experiment.training, num_rows=rows, world_size=experiment.pool.world_size)


def check_pool(settings: UsesPool) -> None:
    """Refuse what cannot run on the pool at all: GPUs that are not there, folders that cannot be written.

    Raises:
        SettingsError: listing every reason.
    """
    problems = []
    for check in (_gpus, _pods, _space):
        try:
            check(settings)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise SettingsError("\n".join(problems))


def _gpus(experiment: UsesPool) -> None:
    pool = experiment.pool
    if pool.backend != "local":
        # What the cluster has is the scheduler's to say.
        return
    check_gpus(
        JobSpec(
            name="check",
            module="",
            arguments={},
            folder="",
            num_nodes=pool.num_nodes,
            processes_per_node=pool.processes_per_node,
            gpus=pool.gpus,
        )
    )


def _pods(experiment: UsesPool) -> None:
    """What a run's folders must be for its pods, before the first of them is made."""
    pool, storage = experiment.pool, experiment.storage.resolved()
    if pool.backend != "kubernetes":
        return
    env = {"TMPDIR": storage.scratch} if storage.scratch else {}
    folders = JobSpec(
        name="check", module="", arguments={}, folder=storage.shared, log_folder=storage.logs, env=env
    )  # fmt: skip
    check_reachable(folders, pool.kubernetes)


def _space(experiment: UsesPool) -> None:
    storage = experiment.storage
    # Scratch is the job's machine's, and a pool's machines are others than this one.
    scratch = storage.scratch if experiment.pool.backend == "local" else None
    for name, path in (("shared", storage.shared), ("logs", storage.logs), ("scratch", scratch)):
        if path is None:
            continue
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"storage.{name}={path}: cannot be made: {error.strerror}; choose another") from error
        if not os.access(folder, os.W_OK):
            raise ValueError(f"storage.{name}={path}: may not be written by this user; choose another")
        free = shutil.disk_usage(folder).free / 1e9
        if name == "shared" and free < storage.min_free_gbytes:
            raise ValueError(
                f"storage.shared={path}: {free:.1f} GB are free and storage.min_free_gbytes={storage.min_free_gbytes:g} "
                "are wanted; free some, choose another folder, or lower the limit"
            )
