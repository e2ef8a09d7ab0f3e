"""The deployments of the flow ``finetune``, whose values stand in ``deployments/prefect.yaml``."""

from pathlib import Path
from typing import Any

import yaml

from tasks.contracts.overrides import SettingsError

FILE = Path(__file__).resolve().parents[2] / "deployments" / "prefect.yaml"


def deployment_values(deployment: str) -> dict[str, Any]:
    """The experiment that a deployment of ``finetune`` is registered with, as plain values.

    Args:
        deployment: ``poc``, or as Prefect writes it, ``finetune/poc``.

    Raises:
        SettingsError: there is no such deployment.
    """
    name = deployment.removeprefix("finetune/")
    found = {
        entry["name"]: entry["parameters"]["experiment"]
        for entry in yaml.safe_load(FILE.read_text())["deployments"]
        if entry["entrypoint"].endswith(":finetune")
    }
    if name not in found:
        raise SettingsError(f"{name!r} is no deployment of finetune; there are: {', '.join(sorted(found))}")
    values: dict[str, Any] = found[name]
    return values
