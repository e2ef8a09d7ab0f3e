"""What is recorded in MLflow: one parent run per flow run, one child run per stage attempt.

Only the orchestrator talks to MLflow. The ranks write their metrics to a file that it follows, so that a tracking server
that is away holds up no GPU, and a run's status comes from the job's real outcome.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from mlflow.artifacts import download_artifacts
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tasks.contracts.comparison import ChampionFigures, PairedDifference
from tasks.contracts.overrides import dotted
from tasks.tracking.server import TrackingUnavailable, check_mlflow

Status = Literal["FINISHED", "FAILED", "KILLED"]
EXPERIMENT = "finetune"
MAX_PARAM_CHARACTERS = 6000
MAX_BATCH = 1000


@dataclass(frozen=True)
class RegisteredAdapter:
    """A version of an adapter in MLflow's registry.

    Attributes:
        source: where its files are, as MLflow's artifact address.
    """

    name: str
    number: str
    source: str
    tags: Mapping[str, str]

    @property
    def base(self) -> str | None:
        """Digest of the base model's weights; None where the version does not say."""
        return self.tags.get("base_weights_sha256")

    @property
    def title(self) -> str:
        """Name and number, in words."""
        return f"{self.name} version {self.number}"


@dataclass(frozen=True)
class Tracking:
    """The MLflow server of the settings' environment.

    Attributes:
        uri: of the tracking server; credentials come from MLflow's own environment variables.
        experiment: the flow's name.
    """

    uri: str
    experiment: str = EXPERIMENT

    @classmethod
    def from_environment(cls, experiment: str = EXPERIMENT) -> Tracking:
        """The server that ``MLFLOW_TRACKING_URI`` names.

        Raises:
            TrackingUnavailable: the variable is not set.
        """
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            raise TrackingUnavailable(
                "MLFLOW_TRACKING_URI is not set: nothing would be recorded. Start the servers with 'make ui', or export "
                "the address of yours, e.g. MLFLOW_TRACKING_URI=http://127.0.0.1:5000"
            )
        # Every ended run would print two lines with its address into the flow's output.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        # A job is looked after by the thread that records it: minutes of MLflow's own retries are minutes without a look.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        return cls(uri, experiment)

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri)

    def link(self, run_id: str) -> str:
        """The run's page."""
        experiment_id = self.client.get_run(run_id).info.experiment_id
        return f"{self.uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"

    def start_parent(self, name: str, tags: Mapping[str, str]) -> str:
        """A new parent run, or the one of the same name that an interrupted attempt of this run left open.

        Raises:
            TrackingUnavailable: the server cannot be reached, refuses us, or is of another version.
        """
        check_mlflow(self.uri)
        try:
            experiment = self.client.get_experiment_by_name(self.experiment)
            experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(self.experiment)
        except MlflowException as error:
            host = urlparse(self.uri).hostname
            raise TrackingUnavailable(
                f"MLflow at {self.uri} cannot be used: {error.message}\nIs the server running ('make ui'), is {host} in "
                "its --allowed-hosts, are MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD right?"
            ) from error
        found = self.client.search_runs(
            [experiment_id], f"attributes.run_name = '{name}' and tags.role = 'run'", max_results=1
        )
        if found:
            parent = str(found[0].info.run_id)
            # Of a flow that was killed: whoever goes on with its jobs records them in children of its own.
            self.end_open_children(parent, "KILLED")
            self.client.update_run(parent, status="RUNNING")
            return parent
        return str(
            self.client.create_run(experiment_id, run_name=name, tags={"role": "run", **tags}).info.run_id
        )  # fmt: skip

    def start_child(self, parent: str, name: str, tags: Mapping[str, str]) -> str:
        """A new run below ``parent``."""
        experiment_id = self.client.get_run(parent).info.experiment_id
        child_tags = {"mlflow.parentRunId": parent, "role": "stage", "stage": name, **tags}
        return str(self.client.create_run(experiment_id, run_name=name, tags=child_tags).info.run_id)

    def end(self, run_id: str, status: Status) -> None:
        """Set a run's final status."""
        self.client.set_terminated(run_id, status)

    def end_open_children(self, parent: str, status: Status) -> None:
        """Set the status of every stage of ``parent`` that is still shown as running."""
        experiment_id = self.client.get_run(parent).info.experiment_id
        query = f"tags.mlflow.parentRunId = '{parent}' and attributes.status = 'RUNNING'"
        for run in self.client.search_runs([experiment_id], query):
            self.end(run.info.run_id, status)

    def log_params(self, run_id: str, settings: Mapping[str, Any]) -> None:
        """Settings as parameters with dotted names; what a retry already logged stays."""
        known = self.client.get_run(run_id).data.params
        params = [
            Param(name, str(value)[:MAX_PARAM_CHARACTERS])
            for name, value in dotted(settings).items()
            if name not in known
        ]
        for start in range(0, len(params), 100):
            self.client.log_batch(run_id, params=params[start : start + 100])

    def log_point(self, run_id: str, step: int, time_s: float, metrics: Mapping[str, float]) -> None:
        """One step of several metrics, at the unix time it was measured."""
        self.client.log_batch(
            run_id, metrics=[Metric(k, float(v), int(time_s * 1000), step) for k, v in metrics.items()]
        )

    def log_metrics(self, run_id: str, metrics: Mapping[str, float | None]) -> None:
        """Final figures; one that is missing is left out."""
        now_ms = int(time.time() * 1000)
        known = [Metric(name, float(value), now_ms, 0) for name, value in metrics.items() if value is not None]
        for start in range(0, len(known), MAX_BATCH):
            self.client.log_batch(run_id, metrics=known[start : start + MAX_BATCH])

    def earlier_runs(self, filter_string: str, limit: int) -> list[MlflowRun]:
        """Runs of the experiment that the filter finds, newest first; none where the experiment is new."""
        experiment = self.client.get_experiment_by_name(self.experiment)
        if experiment is None:
            return []
        return list(
            self.client.search_runs(
                [experiment.experiment_id], filter_string, max_results=limit, order_by=["attributes.start_time DESC"]
            )
        )

    def log_dataset(self, run_id: str, *, name: str, digest: str, source: str, num_rows: int, context: str) -> None:
        """A dataset as input of a run."""
        dataset = Dataset(
            name=name,
            digest=digest[:36],
            source_type="local",
            source=source,
            profile=f'{{"num_rows": {num_rows}}}',
        )
        self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def log_folder(self, run_id: str, folder: Path, artifact_path: str) -> None:
        """A folder's files as artifacts."""
        self.client.log_artifacts(run_id, str(folder), artifact_path)

    def log_files(self, run_id: str, files: Sequence[Path], artifact_path: str | None = None) -> None:
        """Files as artifacts, those that exist."""
        for file in files:
            if file.exists():
                self.client.log_artifact(run_id, str(file), artifact_path)

    def log_table(self, run_id: str, rows: Mapping[str, Sequence[Any]], name: str) -> None:
        """A table that MLflow's UI shows under Evaluation, and beside the table of the same name of other runs."""
        self.client.log_table(run_id, {column: list(values) for column, values in rows.items()}, name)

    def champion_of(self, model: str) -> RegisteredAdapter | None:
        """The version that bears the alias ``champion``; None where there is none."""
        name = registered_name(model)
        try:
            aliases = self.client.get_registered_model(name).aliases
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        if "champion" not in aliases:
            return None
        version = self.client.get_model_version(name, aliases["champion"])
        source = self.client.get_model_version_download_uri(name, version.version)
        return RegisteredAdapter(name, str(version.version), source, dict(version.tags))

    def fetch_adapter(self, adapter: RegisteredAdapter, folder: Path) -> None:
        """The adapter's files into a new folder.

        Raises:
            MlflowException: they are not where the version says.
            OSError: they are there and no adapter.
        """
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            found = Path(download_artifacts(artifact_uri=adapter.source, dst_path=place, tracking_uri=self.uri))
            if not any(found.glob("*.safetensors")):
                raise FileNotFoundError(f"{adapter.source} has no safetensors")
            found.rename(folder)

    def register_adapter(
        self,
        *,
        model: str,
        run_id: str,
        tags: Mapping[str, str],
        passed: bool,
        against: ChampionFigures | None = None,
    ) -> tuple[str, str]:
        """The adapter artifact of ``run_id`` as a new version, the new ``candidate``.

        It becomes ``champion`` where the gates passed and it beats the present champion: on the rows that both were asked here,
        or by a higher ``exact_match`` on the same test set (``dataset_sha256``). Where there is none yet, passing is enough.

        Args:
            against: the champion's own answers to this run's test requests, where it was asked.

        Returns:
            Name and number of the version, and what became of the alias ``champion`` and why.
        """
        name = registered_name(model)
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        champion = self.champion_of(model)
        source = f"{self.client.get_run(run_id).info.artifact_uri}/adapter"
        version = self.client.create_model_version(name, source, run_id=run_id, tags=dict(tags)).version
        self.client.set_registered_model_alias(name, "candidate", version)
        moves, why = takes_the_title(tags, champion, against, passed=passed)
        if moves:
            self.client.set_registered_model_alias(name, "champion", version)
        return f"{name} version {version}", why


def registered_name(model: str) -> str:
    """The name in MLflow's registry that all adapters of a base model have."""
    return "function-calling-" + "".join(c if c.isalnum() else "-" for c in model.lower()).strip("-")


def takes_the_title(
    candidate: Mapping[str, str],
    champion: RegisteredAdapter | None,
    against: ChampionFigures | None,
    *,
    passed: bool,
) -> tuple[bool, str]:
    """Whether a candidate becomes champion, and why or why not.

    Args:
        candidate: its version's tags.
        against: what an earlier champion, perhaps this one, made of the candidate's test requests; None: it was not asked.
    """
    if not passed:
        return False, "stays candidate: its gates did not pass"
    if champion is None:
        return True, "is champion: the first to pass its gates"
    if champion.base != candidate.get("base_weights_sha256"):
        return (
            False,
            f"stays candidate: {champion.title} is of other base weights; to begin anew move the alias by hand",
        )
    if against is not None and against.paired is not None:
        return _by_asking(against.version, against.paired, champion)
    if candidate.get("dataset_sha256") != champion.tags.get("dataset_sha256"):
        why = against.statement if against else "with ask_champion=true it is asked the same requests"
        return False, f"stays candidate: {champion.title} was tested on another dataset; {why}"
    own, theirs = candidate.get("exact_match"), champion.tags.get("exact_match")
    if own is None or theirs is None:
        return False, "stays candidate: a figure to compare it with the champion is missing"
    if float(own) <= float(theirs):
        return False, f"stays candidate: exact match {float(own):.1%} does not beat the champion's {float(theirs):.1%}"
    return True, f"is champion: exact match {float(own):.1%} beats {float(theirs):.1%} on the same test set"


def _by_asking(asked: str, paired: PairedDifference, champion: RegisteredAdapter) -> tuple[bool, str]:
    if asked != champion.title:
        return (
            False,
            f"stays candidate: {champion.title} took the title while {asked} was asked; run it again",
        )
    if paired.difference is None:
        return False, f"stays candidate: no request was scored for it and {champion.title}"
    counts = f"of {paired.n} requests it fixes {paired.num_fixed} and breaks {paired.num_broken}"
    if paired.difference <= 0:
        return False, f"stays candidate: not right more often than {champion.title}, {counts}"
    return True, f"is champion: right more often than {champion.title}, {counts}"
