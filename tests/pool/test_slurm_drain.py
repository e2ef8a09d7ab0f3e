"""A cluster check that drains, on a real Slurm of two nodes: ``make test-slurm``, or with SLURM_CONF naming one."""

import logging
import os
import shlex
import shutil
import subprocess
import sys

import pytest

from tasks import react as reaction_task
from tasks.cluster.report import build_report
from tasks.contracts.cluster_report import Report, Status
from tasks.contracts.files import read_json
from tasks.contracts.job import PoolError
from tasks.pool import slurm_nodes
from tests.cluster.clusters import Cluster
from tests.conftest import REPOSITORY
from tests.faults.cluster import SMALL

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        "SLURM_CONF" not in os.environ or shutil.which("sinfo") is None,
        reason="no Slurm here: make test-slurm starts one",
    ),
]


def sinfo(node: str) -> tuple[str, str]:
    """State and reason of a node, as Slurm tells them."""
    command = ["sinfo", "--noheader", "--Node", f"--nodes={node}", "--partition=main", "--format=%T|%E"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    state, _, reason = told.strip().partition("|")
    return state, reason


def in_use(node: str) -> bool:
    """Whether jobs may start there. Slurm goes on calling a node mixed for a while when its last job has ended."""
    state, reason = sinfo(node)
    return reason == "none" and state.rstrip("*") in ("idle", "mixed", "allocated", "completing")


def run(line: str) -> None:
    """A command as a report shows it, without a shell."""
    subprocess.run(shlex.split(line), check=True)


@pytest.fixture(autouse=True)
def all_nodes_are_in_use_before_and_afterwards():
    assert in_use("node0")
    assert in_use("node1")
    yield
    for node in ("node0", "node1"):
        if not in_use(node):
            run(shlex.join(slurm_nodes.resume_command(node)))
    assert in_use("node0")
    assert in_use("node1")


def drained_as(node: str) -> str | None:
    """The reason with which a node is drained or, while a job still runs there, draining; None: it is not."""
    state, reason = sinfo(node)
    return reason if state in ("drained", "draining") else None


def report_against_node1(monkeypatch, name: str) -> Report:
    monkeypatch.setattr(reaction_task, "get_run_logger", lambda: logging.getLogger("test"))
    pool = {"backend": "slurm", "num_nodes": 2, "processes_per_node": 1, "gpus": True, "max_retries": 0}
    cluster = Cluster(2, 1, pool=pool, reaction={"mode": "drain"})
    for stage in cluster.records:
        cluster.change(stage, lambda r: r.model_copy(update={"scheduler_node": f"node{r.node}"}))
    cluster.figure("devices", "throttled_share", 0.4, 1)
    return reaction_task.react(cluster.evidence, build_report(cluster.evidence, name, 1.79e9, 1.0))


def test_an_accused_node_is_drained_with_our_reason_and_what_is_said_to_undo_it_undoes_it(monkeypatch):
    (action,) = report_against_node1(monkeypatch, "nightly-7").reaction.actions
    assert action.state == "done", action.detail
    assert drained_as("node1") == "proving-ground check nightly-7: devices/throttled_share"
    assert in_use("node0")
    # The next night's check finds it drained, and leaves the first reason there.
    (again,) = report_against_node1(monkeypatch, "nightly-8").reaction.actions
    assert again.state == "already"
    assert again.detail.endswith(": proving-ground check nightly-7: devices/throttled_share")
    assert drained_as("node1") == "proving-ground check nightly-7: devices/throttled_share"
    run(action.undo)
    assert in_use("node1")


def test_a_node_that_slurm_does_not_know_is_an_error():
    with pytest.raises(PoolError, match="node7"):
        slurm_nodes.drain("node7", "x")


def test_a_dry_run_of_the_whole_flow_names_slurms_node_and_its_command_does_what_it_says(tmp_path):
    settings = [
        *SMALL, f"storage.shared={tmp_path}", "pool.backend=slurm", "stages=[inventory]", "reaction.mode=dry_run",
        "inject={kind: wrong_version, node: 1}",
        "pool.slurm.env={PET_LOCAL_ADDR: 127.0.0.1, GLOO_SOCKET_IFNAME: lo}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "flows.cluster_check", "demo", "--run", "dry"]
    for setting in settings:
        command += ["--set", setting]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280)
    assert done.returncode == 3, done.stdout + done.stderr
    report = Report.model_validate(read_json(tmp_path / "checks" / "dry" / "report" / "cluster-check.json"))
    assert report.status is Status.FAIL
    assert [node.name for node in report.nodes] == ["node0", "node1"]
    (action,) = report.reaction.actions
    assert (action.node, action.state) == ("node1", "planned")
    assert action.what in done.stdout
    assert in_use("node1")
    run(action.what)
    assert drained_as("node1") == "proving-ground check dry: inventory/equal_torch"
    run(action.undo)
    assert in_use("node1")
