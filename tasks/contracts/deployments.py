"""The deployments of a flow, whose values stand in ``deployments/prefect.yaml``."""

from pathlib import Path
from typing import Any

import yaml

from tasks.contracts.overrides import SettingsError

FILE = Path(__file__).resolve().parents[2] / "deployments" / "prefect.yaml"


def deployment_values(deployment: str, flow: str = "finetune", parameter: str = "experiment") -> dict[str, Any]:
    """The settings that a deployment of a flow is registered with, as plain values.

    Args:
        deployment: ``poc``, or as Prefect writes it, ``finetune/poc``.
        flow: name of the flow; its function has the same name with underscores.
        parameter: which of the flow's parameters.

    Raises:
        SettingsError: there is no such deployment.
    """
    name = deployment.removeprefix(f"{flow}/")
    found = {
        entry["name"]: entry["parameters"][parameter]
        for entry in yaml.safe_load(FILE.read_text())["deployments"]
        if entry["entrypoint"].endswith(f":{flow.replace('-', '_')}")
    }
    if name not in found:
        raise SettingsError(f"{name!r} is no deployment of {flow}; there are: {', '.join(sorted(found))}")
    values: dict[str, Any] = found[name]
    return values
