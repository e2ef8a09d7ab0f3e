"""Only a node that a FAIL names alone is taken out of use, only where that was asked for, and never more than a few."""

import logging

import pytest

from tasks import react as reaction_task
from tasks.cluster.judge import suspects_of
from tasks.cluster.reaction import accusation, most_nodes
from tasks.cluster.report import build_report, markdown, terminal
from tasks.contracts.cluster_report import Problem, StageOutcome, Status
from tasks.contracts.cluster_settings import ClusterCheck, ReactionSettings
from tasks.react import react
from tests.cluster.clusters import Cluster

SLURM = {"backend": "slurm", "num_nodes": 2, "processes_per_node": 8, "gpus": True, "max_retries": 0}


def scheduled(num_nodes: int = 2, width: int = 8, backend: str = "slurm", **check) -> Cluster:
    """A sound cluster whose nodes the scheduler calls gpu-0, gpu-1 and so on."""
    pool = {"num_nodes": num_nodes, "processes_per_node": width, "gpus": True, "max_retries": 0, "backend": backend}
    cluster = Cluster(num_nodes, width, pool=pool, **check)
    for stage in cluster.records:
        cluster.change(stage, lambda r: r.model_copy(update={"scheduler_node": f"gpu-{r.node}"}))
    return cluster


def accused(cluster: Cluster):
    return accusation(cluster.evidence, cluster.findings())


def test_a_sound_cluster_accuses_nobody():
    assert accused(scheduled()).nodes == {}
    assert not accused(scheduled()).left_alone


def test_a_gpu_that_fails_accuses_its_node_by_the_schedulers_name_with_all_its_gates():
    cluster = scheduled(4)
    cluster.figure("devices", "throttled_share", 0.4, 14)
    cluster.figure("devices", "memory_pattern_wrong_bytes", 3, 15)
    found = accused(cluster)
    assert dict(found.nodes) == {"gpu-1": ("devices/memory_pattern_wrong_bytes", "devices/throttled_share")}
    assert not found.left_alone


def test_warnings_and_errors_accuse_nobody():
    cluster = scheduled()
    cluster.fact("inventory", "xids", ["NVRM: Xid (PCI:0000:01:00): 48"], 8)
    cluster.fact(
        "inventory", "gpus", [{**cluster.records["inventory"][8].facts["gpus"][0], "busy_processes": [7]}] * 8, 8
    )
    statuses = {cluster.bad()[f"inventory/{gate}"].status for gate in ("xid", "gpu_busy")}
    assert statuses == {Status.WARN, Status.ERROR}
    assert accused(cluster).nodes == {}


def test_a_link_between_two_nodes_accuses_neither():
    cluster = scheduled()
    cluster.figure("collectives", "pair_gbytes_per_s", 3.7, *range(8, 16), only=lambda f: int(f.peer) < 8)
    cluster.figure("collectives", "pair_gbytes_per_s", 3.7, *range(8), only=lambda f: int(f.peer) >= 8)
    assert cluster.bad()["collectives/pairs"].culprits == ("the link between gpu-0 and gpu-1",)
    found = accused(cluster)
    assert found.nodes == {}
    assert found.left_alone == (
        "the link between gpu-0 and gpu-1 (collectives/pairs): is no node that the scheduler knows",
    )


def test_two_nodes_that_differ_accuse_neither_and_of_four_the_odd_one():
    two = scheduled(2, 1)
    two.fact("devices", "step_sha256", "other", 1)
    assert set(two.bad()["devices/step_equal_on_all"].culprits) == {"gpu-0/gpu0", "gpu-1/gpu0"}
    assert accused(two).nodes == {}
    assert "names all 2 nodes" in accused(two).left_alone[0]
    four = scheduled(4, 1)
    four.fact("devices", "step_sha256", "other", 2)
    assert list(accused(four).nodes) == ["gpu-2"]


def test_of_more_nodes_than_are_allowed_none_is_touched():
    cluster = scheduled(8, 1)
    for rank in (2, 5):
        cluster.figure("devices", "throttled_share", 0.4, rank)
    found = accused(cluster)
    assert found.nodes == {}
    assert "gpu-2, gpu-5: 2 nodes are accused and at most 1 may" in found.left_alone[0]
    assert "reaction.max_nodes" in found.left_alone[0]
    more = scheduled(8, 1, reaction={"mode": "drain", "max_nodes": 2, "max_share": 0.25})
    for rank in (2, 5):
        more.figure("devices", "throttled_share", 0.4, rank)
    assert sorted(accused(more).nodes) == ["gpu-2", "gpu-5"]


@pytest.mark.parametrize(
    ("max_nodes", "max_share", "num_nodes", "allowed"),
    [(1, 0.1, 2, 1), (1, 0.1, 64, 1), (4, 0.1, 2, 1), (4, 0.1, 25, 2), (4, 0.1, 64, 4), (99, 0.29, 100, 29)],
)
def test_both_limits_hold_and_one_node_is_always_allowed(max_nodes, max_share, num_nodes, allowed):
    assert most_nodes(ReactionSettings(max_nodes=max_nodes, max_share=max_share), num_nodes) == allowed


def test_the_programs_own_error_is_no_nodes_fault_and_a_killed_rank_is():
    for is_own_error, expected in ((True, []), (False, ["gpu-1"])):
        cluster = scheduled()
        cluster.outcomes["devices"] = StageOutcome(
            stage="devices", state="failed", error="rank 9", culprit_ranks=(9,), is_own_error=is_own_error
        )
        assert cluster.bad()["devices/finished"].culprits == ("gpu-1/gpu1",)
        assert list(accused(cluster).nodes) == expected


def test_a_node_that_never_came_is_not_taken_for_another_that_the_scheduler_calls_by_its_number():
    """Of a job on node1 and node2 the second, number 1, stayed away: the report called it node1, and node1 was sound."""
    cluster = scheduled(2, 1, stages=("inventory", "devices"))
    for stage in cluster.records:
        cluster.change(stage, lambda r: r.model_copy(update={"scheduler_node": f"node{r.node + 1}"}))
    cluster.records["devices"] = cluster.records["devices"][:1]
    cluster.outcomes["devices"] = StageOutcome(stage="devices", state="failed", error="never came", culprit_nodes=(1,))
    assert cluster.bad()["devices/finished"].culprits == ("node number 1",)
    assert accused(cluster).nodes == {}


def test_a_check_on_this_machine_knows_no_schedulers_nodes():
    # Its processes may themselves run in a job of Slurm's, whose node both emulated nodes then are.
    cluster = scheduled(backend="local")
    cluster.figure("devices", "throttled_share", 0.4, 8)
    assert cluster.bad()["devices/throttled_share"].culprits == ("host-1/gpu0",)
    assert accused(cluster).nodes == {}


@pytest.mark.parametrize("mode", ["dry_run", "drain"])
def test_on_this_machine_there_is_nothing_to_drain(mode):
    with pytest.raises(
        ValueError, match=f"reaction.mode={mode}: pool.backend=local has no scheduler.*set reaction.mode=none"
    ):
        ClusterCheck(reaction={"mode": mode})
    assert ClusterCheck().reaction.mode == "none"


def test_nobody_is_drained_for_a_fault_that_the_check_did_itself():
    with pytest.raises(ValueError, match="inject=sleep does a fault to a sound node.*set reaction.mode=dry_run"):
        ClusterCheck(pool=SLURM, inject={"kind": "sleep"}, reaction={"mode": "drain"})
    ClusterCheck(pool=SLURM, inject={"kind": "sleep"}, reaction={"mode": "dry_run"})


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Slurm's commands, which write down how they are called, and whose node is drained once scontrol was called."""
    monkeypatch.setattr(reaction_task, "get_run_logger", lambda: logging.getLogger("test"))
    calls = tmp_path / "calls"
    calls.write_text("")
    scripts = {
        "scontrol": f'printf "%s\\n" scontrol "$@" >> {calls}\n[ ! -e {tmp_path}/refuse ] || '
        '{ echo "slurm_update error: Access/permission denied" >&2; exit 1; }\n',
        "sinfo": f'if grep -q scontrol {calls}; then echo "${{AFTER:-drained}}|ours"; else echo "${{BEFORE:-idle}}|none"; fi\n',
    }
    for name, script in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path


def reported(cluster: Cluster):
    return react(cluster.evidence, build_report(cluster.evidence, "nightly-7", 1.79e9, 1.0))


def bad_node(mode: str, backend: str = "slurm") -> Cluster:
    cluster = scheduled(reaction={"mode": mode}, backend=backend)
    cluster.figure("devices", "throttled_share", 0.4, 8)
    return cluster


COMMAND = "scontrol update NodeName=gpu-1 State=DRAIN 'Reason=proving-ground check nightly-7: devices/throttled_share'"


def test_a_dry_run_says_exactly_what_would_be_done_and_does_nothing(tools):
    report = reported(bad_node("dry_run"))
    (action,) = report.reaction.actions
    assert (action.state, action.what) == ("planned", COMMAND)
    assert (tools / "calls").read_text() == ""
    for text in (terminal(report), markdown(report)):
        assert COMMAND in text
        assert "undo: scontrol update NodeName=gpu-1 State=RESUME" in text
        assert "nothing was done" in text
    assert report.statement.endswith("Look at gpu-1/gpu0. Reaction: gpu-1 would be taken out of use.")


def test_without_a_reaction_nothing_is_done_or_said(tools):
    report = reported(bad_node("none"))
    assert report.reaction is None
    assert (tools / "calls").read_text() == ""
    assert "reaction" not in terminal(report)


def test_a_node_is_drained_by_one_command_whose_arguments_no_shell_reads(tools):
    report = reported(bad_node("drain"))
    (action,) = report.reaction.actions
    assert action.state == "done"
    assert (tools / "calls").read_text().splitlines() == [
        "scontrol", "update", "NodeName=gpu-1", "State=DRAIN", "Reason=proving-ground check nightly-7: devices/throttled_share",
    ]  # fmt: skip
    assert "Reaction: gpu-1 is out of use now." in report.statement
    assert report.status is Status.FAIL


def test_a_node_that_somebody_has_drained_keeps_its_reason(tools, monkeypatch):
    monkeypatch.setenv("BEFORE", "drained")
    (action,) = reported(bad_node("drain")).reaction.actions
    assert (action.state, action.detail) == ("already", "drained: none")
    assert (tools / "calls").read_text() == ""


def test_a_refusal_is_loud_and_a_silence_is_no_success(tools, monkeypatch, caplog):
    (tools / "refuse").touch()
    report = reported(bad_node("drain"))
    (action,) = report.reaction.actions
    assert action.state == "failed"
    assert "Access/permission denied; draining is for whom Slurm calls an operator" in action.detail
    assert "Reaction: gpu-1 could NOT be taken out of use." in report.statement
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    (tools / "refuse").unlink()
    (tools / "calls").write_text("")
    monkeypatch.setenv("AFTER", "idle")
    (action,) = reported(bad_node("drain")).reaction.actions
    assert action.state == "failed"
    assert "Slurm says that gpu-1 is idle" in action.detail


@pytest.mark.parametrize("name", ["gpu-[0-9]", "gpu-0,gpu-1", "ALL", "-w", "gpu 1", "gpu-1\n", "gpu=1"])
def test_a_name_of_several_nodes_or_of_none_is_left_alone(tools, name):
    cluster = bad_node("drain")
    for stage in cluster.records:
        cluster.change(stage, lambda r: r.model_copy(update={"scheduler_node": name}), *range(8, 16))
    report = reported(cluster)
    assert report.reaction.actions == ()
    assert "is no name of one node of Slurm" in report.reaction.left_alone[0]
    assert (tools / "calls").read_text() == ""


def test_on_kubernetes_a_dry_run_shows_the_taint():
    cluster = bad_node("dry_run", backend="kubernetes")
    (action,) = react_quietly(cluster).reaction.actions
    assert action.what == 'taint {"key": "proving-ground/cluster-check", "value": "nightly-7", "effect": "NoSchedule"}'
    assert action.undo == "kubectl taint nodes gpu-1 proving-ground/cluster-check:NoSchedule-"


def react_quietly(cluster: Cluster):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reaction_task, "get_run_logger", lambda: logging.getLogger("test"))
        return reported(cluster)


def without_figures(cluster: Cluster, root: str, rank: int) -> None:
    keep = lambda r: tuple(f for f in r.figures if not f.name.startswith(f"{root}_"))  # noqa: E731
    cluster.change("storage", lambda r: r.model_copy(update={"figures": keep(r)}), rank)


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_a_full_shared_filesystem_accuses_no_node_and_a_full_scratch_its_own(num_nodes):
    rank = 8 * (num_nodes - 1)
    cluster = scheduled(num_nodes)
    full = Problem(gate="shared_has_space", error="/shared: No space left on device")
    cluster.change("storage", lambda r: r.model_copy(update={"problems": (full,)}), rank)
    without_figures(cluster, "shared", rank)
    assert {gate: f.culprits for gate, f in cluster.bad().items()} == {"storage/shared_has_space": ("storage.shared",)}
    assert accused(cluster).nodes == {}
    # As after inject=full_disk, which counts as caught where the node comes first.
    own = Problem(gate="scratch_writable", error="/tmp: No space left on device")
    cluster.change("storage", lambda r: r.model_copy(update={"problems": (full, own)}), rank)
    without_figures(cluster, "scratch", rank)
    first = suspects_of(cluster.findings())[0]
    assert (first.place, "storage/scratch_writable" in first.gates) == (f"gpu-{num_nodes - 1}", True)
