"""``python -m flows.cluster_check``: an earlier check's word is never this one's."""

import json
import logging
from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException
from prefect.states import Failed

from flows.cluster_check import ERROR, _tell, check_name, settings_of
from tasks import check_cluster
from tasks.cluster.evidence import history_key
from tasks.cluster.report import build_report
from tasks.contracts.cluster_report import Status
from tasks.contracts.cluster_settings import ClusterCheck, CollectiveProbeSettings
from tasks.contracts.job import FailureKind, JobError, JobFailed, JobState, MayStillRun
from tasks.contracts.overrides import SettingsError
from tasks.contracts.run_folder import CheckFolder
from tasks.contracts.settings import StorageSettings
from tests.cluster.clusters import Cluster


@pytest.fixture
def folder(tmp_path):
    """Of a check that was made before, and passed."""
    folder = CheckFolder(StorageSettings(shared=str(tmp_path)), "mine")
    folder.report.mkdir(parents=True)
    (folder.root / "check.json").write_text(json.dumps({"flow_run_id": "first"}))
    (folder.report / "cluster-check.json").write_text("{}")
    return folder


def test_a_name_that_is_taken_is_refused_and_a_retry_of_its_flow_run_is_not(folder):
    with pytest.raises(SettingsError, match="there is a check mine in .* give another --run"):
        check_name(folder)
    with pytest.raises(SettingsError, match="mine"):
        check_name(folder, "second")
    check_name(folder, "first")


def test_a_check_that_crashed_is_an_error_whatever_report_lies_there(folder, capsys):
    assert _tell(Failed(message="boom"), folder) == ERROR
    assert "the check failed: boom" in capsys.readouterr().err


def test_a_misspelt_chip_or_fabric_is_refused_and_those_there_are_are_named():
    with pytest.raises(SettingsError, match="chip=H1000: there are auto, A100, H100"):
        settings_of({}, ["chip=H1000"])
    with pytest.raises(SettingsError, match=r"node_fabric=nvlink 4: there are auto.* nvlink4"):
        settings_of({}, ["node_fabric=nvlink 4"])
    assert settings_of({}, ["chip=H100", "cluster_fabric=infiniband_ndr"]).chip == "H100"


def test_the_largest_message_that_is_asked_for_is_sent():
    sizes = CollectiveProbeSettings(min_kib=1, max_mib=8192, size_factor=4).sizes_bytes()
    assert sizes[-2:] == (4 * 2**30, 8 * 2**30)
    assert CollectiveProbeSettings(min_kib=1, max_mib=1, size_factor=4).sizes_bytes()[-1] == 2**20


def test_a_soak_that_its_job_has_no_time_for_is_refused():
    pool = {"time_limit_minutes": 20}
    with pytest.raises(ValueError, match="soak_minutes=120 does not fit"):
        ClusterCheck(stages=("inventory", "endurance"), soak_minutes=120, pool=pool)
    ClusterCheck(soak_minutes=120, pool=pool)


@pytest.mark.parametrize(
    ("state", "said", "becomes"),
    [
        (JobState.QUEUED, "still queued after 15 minutes (Resources)", "yielded"),
        (JobState.QUEUED, "still queued after 15 minutes (Priority)", "yielded"),
        (JobState.QUEUED, "still queued after 15 minutes (no reason given)", "yielded"),
        (JobState.QUEUED, "still queued after 15 minutes (other jobs have the GPUs)", "yielded"),
        (
            JobState.QUEUED,
            "0/3 nodes are available: 1 node(s) had untolerated taint {node-role.kubernetes.io/control-plane: }, "
            "2 Insufficient nvidia.com/gpu.",
            "yielded",
        ),
        (JobState.QUEUED, "still queued after 15 minutes (ReqNodeNotAvail, UnavailableNodes:gpu-1)", "error"),
        (JobState.QUEUED, "(Nodes_required_for_job_are_DOWN,_DRAINED_or_reserved)", "error"),
        (JobState.QUEUED, "(PartitionTimeLimit)", "error"),
        (
            JobState.QUEUED,
            "0/2 nodes are available: 1 node(s) had untolerated taint {proving-ground/cluster-check: nightly-7}, "
            "1 Insufficient nvidia.com/gpu.",
            "error",
        ),
        (JobState.QUEUED, "0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector.", "error"),
        (JobState.PREEMPTED, "Slurm says PREEMPTED", "yielded"),
        (JobState.PREEMPTED, "Slurm says NODE_FAIL", "failed"),
        (JobState.CANCELLED, "CANCELLED by 1000", "error"),
        (JobState.FAILED, "rank 1: boom", "failed"),
    ],
)
def test_only_what_the_cluster_did_is_held_against_it(monkeypatch, tmp_path, state, said, becomes):
    def end(run, name, job):
        raise JobFailed("job", state, JobError(said, kind=FailureKind.LOST))

    monkeypatch.setattr(check_cluster, "run_stage", end)
    monkeypatch.setattr(check_cluster, "get_run_logger", lambda: logging.getLogger("test"))
    (tmp_path / "001").mkdir()
    (tmp_path / "001" / "spec.json").write_text("{}")
    job = SimpleNamespace(folder=tmp_path, num_nodes=2, processes_per_node=1)
    outcome = check_cluster._run_job(None, "devices", job)
    assert outcome.state == becomes
    assert said in outcome.error


def test_a_check_ends_where_a_job_may_still_run_so_that_the_next_stage_is_not_started_beside_it(monkeypatch):
    def end(run, name, job):
        raise MayStillRun("job devices may still run")

    monkeypatch.setattr(check_cluster, "run_stage", end)
    with pytest.raises(MayStillRun):
        check_cluster._run_job(None, "devices", SimpleNamespace(folder="devices"))


def test_the_verdict_lies_on_the_disk_before_a_node_is_touched(monkeypatch):
    did = []

    def break_down(evidence, report):
        raise RuntimeError("scontrol broke the process")

    monkeypatch.setattr(check_cluster, "gather", lambda run, outcomes: "evidence")
    monkeypatch.setattr(check_cluster, "build_report", lambda *args: "verdict")
    monkeypatch.setattr(check_cluster, "_earlier", lambda run, query: ([], None))
    monkeypatch.setattr(check_cluster, "write", lambda report, folder, trend: did.append(report))
    monkeypatch.setattr(check_cluster, "react", break_down)
    folder = SimpleNamespace(run="nightly-7", report="report")
    with pytest.raises(RuntimeError, match="scontrol broke"):
        check_cluster.conclude.fn(SimpleNamespace(check=ClusterCheck(), folder=folder), {}, 0.0)
    assert did == ["verdict"]


@pytest.mark.parametrize(
    ("status", "earlier", "told"),
    [
        ("PASS", [], None),
        ("FAIL", [], None),
        ("PASS", ["PASS"], None),
        ("FAIL", ["PASS"], "PASS"),
        ("PASS", ["FAIL", "SKIP"], "FAIL"),
        ("FAIL", ["FAIL", "SKIP"], None),
        ("SKIP", ["PASS"], None),
        ("SKIP", ["PASS"] + ["SKIP"] * 5, None),
        ("SKIP", ["PASS"] + ["SKIP"] * 6, "PASS"),
        ("SKIP", ["PASS"] + ["SKIP"] * 7, None),
        ("SKIP", ["SKIP"] * 13, "none"),
    ],
)
def test_people_are_told_of_another_verdict_and_of_a_week_without_one(status, earlier, told):
    assert check_cluster.news(Status(status), earlier) == told


@pytest.mark.parametrize(("kind", "is_own_error"), [(FailureKind.USER, True), (FailureKind.TRANSIENT, False)])
def test_an_error_of_the_program_is_kept_apart_from_a_process_that_gave_way(monkeypatch, tmp_path, kind, is_own_error):
    def end(run, name, job):
        raise JobFailed("job", JobState.FAILED, JobError("rank 1", kind=kind))

    monkeypatch.setattr(check_cluster, "run_stage", end)
    monkeypatch.setattr(check_cluster, "get_run_logger", lambda: logging.getLogger("test"))
    (tmp_path / "001").mkdir()
    (tmp_path / "001" / "spec.json").write_text("{}")
    job = SimpleNamespace(folder=tmp_path, num_nodes=2, processes_per_node=1)
    assert check_cluster._run_job(None, "devices", job).is_own_error is is_own_error


def test_without_mlflow_a_verdict_is_given_and_says_what_is_not_known(monkeypatch):
    def away(query, limit):
        raise MlflowException("API request failed: connection refused")

    monkeypatch.setattr(check_cluster, "get_run_logger", lambda: logging.getLogger("test"))
    run = SimpleNamespace(tracking=SimpleNamespace(earlier_runs=away))
    found, problem = check_cluster._earlier(run, "query")
    assert found == []
    assert "no history to compare with (API request failed" in problem


def test_verdicts_are_compared_between_checks_of_the_same_stages_and_profile_only():
    nightly = ClusterCheck()
    assert check_cluster.asked(nightly) == check_cluster.asked(nightly.model_copy(update={"cluster": "other"}))
    assert check_cluster.asked(nightly) != check_cluster.asked(ClusterCheck(thresholds={"profile": "reference"}))
    assert check_cluster.asked(nightly) != check_cluster.asked(ClusterCheck(stages=("inventory",)))


def test_what_has_drifted_is_kept_out_of_the_next_history():
    cluster = Cluster()
    (before,) = [p for p in cluster.evidence.placed() if p.figure.name == "training_tokens_per_s_per_gpu"]
    cluster.history = {history_key(before): [12000.0] * 6}
    cluster.training = [
        f.model_copy(update={"value": 10500.0}) if f.name == before.figure.name else f for f in cluster.training
    ]
    report = build_report(cluster.evidence, "run", 0.0, 1.0)
    assert check_cluster.drifted_keys(report) == [history_key(before)]
