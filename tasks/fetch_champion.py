"""Stage: the adapter that bears MLflow's alias ``champion``, brought here so that it can be asked as well."""

import shutil
from dataclasses import dataclass

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from tasks.contracts.files import publish_folder, read_json, write_json
from tasks.run import Run
from tasks.train_adapter import TrainedAdapter

ABOUT = "champion.json"


@dataclass(frozen=True)
class Champion:
    """The champion's adapter on the shared storage, and its name and number in the registry."""

    path: str
    version: str


@task(name="fetch_champion", cache_policy=NO_CACHE)
def fetch_champion(run: Run, adapter: TrainedAdapter) -> Champion | None:
    """The present champion of the run's model; None, said in the log, where there is none for the same base.

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
        base, own = found.tags.get("base_weights_sha256"), adapter.figures["base_weights_sha256"]
        if base != own:
            get_run_logger().warning(
                "ask_champion: %s was trained on other weights of %s (%s, now %s) and is not asked",
                found.title, run.experiment.model.name, base, own,
            )  # fmt: skip
            return None
        temporary = final.with_name(".champion.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        run.tracking.fetch_adapter(found, temporary)
        write_json(temporary / ABOUT, {"version": found.title})
        publish_folder(temporary, final)
    return Champion(str(final / "adapter"), read_json(final / ABOUT)["version"])
