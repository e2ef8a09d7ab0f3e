"""Stage: the adapter that bears MLflow's alias ``champion``, brought here so that it can be asked as well."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from mlflow.exceptions import MlflowException
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from tasks.contracts.files import publish_folder, read_json, write_json
from tasks.run import Run
from tasks.tracking.mlflow_runs import RegisteredAdapter
from tasks.train_adapter import TrainedAdapter

ABOUT, FILES = "champion.json", "adapter"


@dataclass(frozen=True)
class Champion:
    """The registry's champion.

    Attributes:
        path: its adapter on the shared storage; None where it cannot be asked.
        version: its name and number.
        why_not: what keeps it from being asked, in words.
    """

    path: str | None
    version: str
    why_not: str = ""


@task(name="fetch_champion", cache_policy=NO_CACHE)
def fetch_champion(run: Run, adapter: TrainedAdapter) -> Champion | None:
    """The present champion of the run's model; None where there is none.

    A run that is taken up again asks the one that it had: another may have taken the title since.

    Args:
        adapter: the run's own, whose base it must share.
    """
    final = run.folder.champion
    if not final.exists():
        found = run.tracking.champion_of(run.experiment.model.name)
        if found is None:
            get_run_logger().info("ask_champion: no adapter of %s is champion yet", run.experiment.model.name)
            return None
        own = adapter.figures["base_weights_sha256"]
        if found.base != own:
            return _unasked(found, f"it is of other base weights, {found.base}, and these are {own}")
        try:
            _bring(run, found, final)
        except (MlflowException, OSError) as error:
            # The training has ended well and is worth a comparison with the original all the same.
            return _unasked(found, f"its files cannot be had from {found.source}: {error}")
    return Champion(str(final / FILES), read_json(final / ABOUT)["version"])


def _unasked(found: RegisteredAdapter, why: str) -> Champion:
    get_run_logger().error("ask_champion: %s is not asked: %s", found.title, why)
    return Champion(None, found.title, why)


def _bring(run: Run, adapter: RegisteredAdapter, final: Path) -> None:
    temporary = final.with_name(".champion.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    run.tracking.fetch_adapter(adapter, temporary / FILES)
    write_json(temporary / ABOUT, {"version": adapter.title})
    publish_folder(temporary, final)
