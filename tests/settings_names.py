"""Which variables the servers and workers know: a misspelt one is ignored without a word."""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import mlflow
from prefect.settings import Settings
from prefect.settings.legacy import _get_valid_setting_names
from prefect_kubernetes.settings import KubernetesSettings

from infra.docker.with_secrets import SUFFIX


@cache
def of_prefect() -> set[str]:
    return {*_get_valid_setting_names(Settings), *_get_valid_setting_names(KubernetesSettings)}


@cache
def of_mlflow() -> set[str]:
    """Every name in MLflow's code: it reads its variables in many places, and lists them in none."""
    files = Path(mlflow.__file__).parent.rglob("*.py")
    return {name for file in files for name in re.findall(r"\bMLFLOW_[A-Z_]+\b", file.read_text(errors="replace"))}


def unknown_settings(names: Iterable[str]) -> list[str]:
    """Those that begin as Prefect's or MLflow's and are neither's."""
    plain = {name.removesuffix(SUFFIX) for name in names}
    unknown = {name for name in plain if name.startswith("PREFECT_")} - of_prefect()
    return sorted(unknown | {name for name in plain if name.startswith("MLFLOW_")} - of_mlflow())
