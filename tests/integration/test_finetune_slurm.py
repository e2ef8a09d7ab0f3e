"""The whole flow on a real Slurm of two nodes, against the same run on this machine: ``make test-slurm``."""

import os
import shutil

import pytest

from tasks.contracts.attempt import read_points
from tasks.contracts.files import read_json
from tests.integration.finetune_process import STAGES, finish, mlflow_statuses, prefect_states, start

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore"),
    # CI runs it beside the demo: two whole flows on what that leaves of two cores.
    pytest.mark.timeout(2400),
    pytest.mark.skipif(
        "SLURM_CONF" not in os.environ or shutil.which("sinfo") is None,
        reason="no Slurm here: make test-slurm starts one",
    ),
]


def test_slurm_trains_to_the_very_losses_of_the_local_pool(first_run, storage, stack):
    code, output = finish(start(storage, stack, "on-slurm", deployment="demo-slurm"))
    # The small run cannot pass the gates, wherever it runs.
    assert code == 3, output
    runs = storage / "runs"
    handle = read_json(runs / "on-slurm" / "jobs" / "train_adapter" / "001" / "handle.json")
    assert handle["slurm_job_id"].isdigit()
    losses = [
        [metrics["train/loss"] for _, metrics in read_points(runs / run / "jobs" / "train_adapter")]
        for run in ("first", "on-slurm")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    assert prefect_states(stack, "on-slurm")[0] == "GatesFailed"
    assert mlflow_statuses(stack, "on-slurm") == ("FAILED", dict.fromkeys(STAGES, "FINISHED"))
