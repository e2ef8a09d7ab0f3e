"""The ring alone and single rails: planned from what was found, told to the ranks exactly, and judged each by itself."""

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tasks import check_cluster
from tasks.check_cluster import measure
from tasks.cluster.evidence import history_key, read_records
from tasks.cluster.judge import status_of
from tasks.cluster.report import build_report
from tasks.cluster.variants import rails_of, variants_of
from tasks.contracts.cluster_report import Problem, RankRecord, StageOutcome, Status, VariantOutcome
from tasks.contracts.cluster_settings import ClusterCheck
from tasks.contracts.job import FailureKind, JobError, JobFailed, JobSpec, JobState
from tasks.contracts.run_folder import CheckFolder
from tasks.contracts.settings import StorageSettings
from tasks.pool.stage_jobs import variant_probe_job
from tasks.run import CheckRun
from tests.cluster.clusters import Cluster
from tests.conftest import REPOSITORY

RAILS = [f"mlx5_{number}" for number in range(8)]


def statuses(cluster: Cluster) -> dict[str, Status]:
    return {f.gate: f.status for f in cluster.findings() if f.gate.startswith(("ring", "rail"))}


def test_a_sound_cluster_has_a_gate_for_the_ring_and_for_each_rail_and_all_pass():
    cluster = Cluster()
    assert cluster.bad() == {}
    found = statuses(cluster)
    assert {"ring", *(f"rail {rail}" for rail in RAILS)} <= found.keys()
    assert {"ring_all_reduce_busbw_gbytes_per_s", "rail_all_reduce_busbw_gbytes_per_s"} <= found.keys()
    assert set(found.values()) == {Status.PASS}
    placed = [p for p in cluster.evidence.placed() if p.figure.name == "rail_all_reduce_busbw_gbytes_per_s"]
    assert sorted(p.place for p in placed) == [f"rail {rail}" for rail in RAILS]
    # A name with a space in it would be two in the list of those that have drifted.
    assert history_key(placed[3]) == "collectives/rail_all_reduce_busbw_gbytes_per_s/268435456/rail_mlx5_3"


def slow(cluster: Cluster, name: str, value: float) -> None:
    cluster.variants[name] = [
        r.model_copy(update={"figures": tuple(f.model_copy(update={"value": value}) for f in r.figures)})
        for r in cluster.variants[name]
    ]


def test_a_rail_that_is_slow_beside_the_others_is_named_and_no_other():
    cluster = Cluster()
    slow(cluster, "rail mlx5_3", 23.0)
    finding = cluster.bad()["collectives/rail_all_reduce_busbw_gbytes_per_s"]
    assert (finding.status, finding.layer, finding.culprits) == (Status.FAIL, "fleet", ("rail mlx5_3",))
    assert "ibstat" in finding.action
    report = build_report(cluster.evidence, "run", 0.0, 1.0)
    assert [s.place for s in report.suspects] == ["rail mlx5_3"]
    slow(cluster, "rail mlx5_3", 45.0)
    assert cluster.bad() == {}


def test_a_ring_that_misses_its_limit_names_the_fabric():
    name = "ring_all_reduce_busbw_gbytes_per_s@268435456"
    cluster = Cluster(thresholds={"overrides": {name: 370}})
    finding = cluster.bad()["collectives/ring_all_reduce_busbw_gbytes_per_s"]
    assert (finding.limit, finding.culprits) == (370, ("the fabric between the nodes",))


def test_a_wrong_sum_on_one_rail_alone_is_wrong():
    cluster = Cluster()
    problem = Problem(gate="rail_all_reduce_correct", error="1 of 256 elements are wrong")
    records = cluster.variants["rail mlx5_5"]
    cluster.variants["rail mlx5_5"] = [records[0].model_copy(update={"problems": (problem,)}), *records[1:]]
    assert cluster.bad()["collectives/rail_all_reduce_correct"].culprits == ("host-0/gpu0",)


def without(cluster: Cluster, name: str, *others: VariantOutcome) -> None:
    kept = tuple(v for v in cluster.outcomes["collectives"].variants if v.name != name)
    cluster.outcomes["collectives"] = cluster.outcomes["collectives"].model_copy(update={"variants": (*kept, *others)})
    cluster.variants[name] = []


@pytest.mark.parametrize(
    ("state", "status", "culprits"),
    [("failed", Status.FAIL, ("rail mlx5_3",)), ("error", Status.ERROR, ()), ("yielded", Status.SKIP, ())],
)
def test_a_rail_whose_job_did_not_end_well_says_why_and_only_a_failure_accuses_it(state, status, culprits):
    cluster = Cluster()
    without(cluster, "rail mlx5_3", VariantOutcome(name="rail mlx5_3", state=state, error="NCCL error: unhandled"))
    (finding,) = [f for f in cluster.findings() if f.gate == "rail mlx5_3"]
    assert (finding.status, finding.culprits, finding.detail) == (status, culprits, "NCCL error: unhandled")
    assert {gate for gate, found in cluster.bad().items() if found.status is Status.FAIL} <= {"collectives/rail mlx5_3"}


def test_variants_that_gave_way_make_the_check_no_pass_and_no_fail_of_limits_that_nothing_met():
    limits = dict.fromkeys(["ring_all_reduce_busbw_gbytes_per_s@268435456", "rail_all_reduce_busbw_gbytes_per_s"], 40)
    cluster = Cluster(thresholds={"overrides": limits})
    for variant in cluster.outcomes["collectives"].variants:
        without(cluster, variant.name, variant.model_copy(update={"state": "yielded", "error": "the pool is taken"}))
    findings = cluster.findings()
    assert cluster.bad() == {}
    assert status_of(findings) is Status.SKIP
    (finding,) = [f for f in findings if f.gate == "gave_way"]
    assert finding.detail.startswith("not measured: ring, rail mlx5_0, ")
    assert {f.gate for f in findings if f.layer == "limit" and f.status is Status.SKIP} == {
        f"limit {n}" for n in limits
    }


@pytest.mark.parametrize("name", ["ring", "rail mlx5_3"])
def test_a_rank_without_a_readable_record_of_a_variant_is_no_pass_of_its_sums(name):
    cluster = Cluster()
    cluster.variants[name] = [
        r.model_copy(update={"host": f"host-{1 - r.node}"}) for r in cluster.variants[name] if r.rank not in (4, 9)
    ]
    finding = cluster.bad()[f"collectives/{name}"]
    assert (finding.status, finding.culprits) == (Status.FAIL, ("host-1/gpu4", "host-0/gpu1"))
    assert finding.detail == "no readable record of rank 4, 9"


def test_what_was_planned_and_not_measured_is_no_pass():
    cluster = Cluster()
    without(cluster, "ring")
    assert statuses(cluster)["ring"] is Status.FAIL
    cluster = Cluster()
    cluster.variants["ring"] = []
    assert statuses(cluster)["ring_all_reduce_busbw_gbytes_per_s"] is Status.FAIL


def test_a_figure_of_other_adapters_than_the_rails_own_is_an_error():
    cluster = Cluster()
    cluster.variants["rail mlx5_3"] = [
        r.model_copy(update={"facts": r.facts | {"transport": {"network": "IB", "adapters": RAILS}}})
        if r.node == 1 else r
        for r in cluster.variants["rail mlx5_3"]
    ]  # fmt: skip
    finding = cluster.bad()["collectives/rail mlx5_3"]
    assert finding.status is Status.ERROR
    assert finding.detail.startswith("NCCL used other adapters than mlx5_3: host-1: mlx5_0, mlx5_1")


@pytest.mark.parametrize(
    ("cluster", "why"),
    [
        (Cluster(gpus=False), "gloo has neither NCCL's algorithms nor its adapters"),
        (Cluster(num_nodes=1), "nothing goes between nodes"),
    ],
)
def test_where_there_is_nothing_to_choose_both_are_skipped_and_say_why(cluster, why):
    found = {f.gate: f for f in cluster.findings() if f.gate in ("ring", "rails")}
    assert {(gate, f.status) for gate, f in found.items()} == {("ring", Status.SKIP), ("rails", Status.SKIP)}
    assert all(why in f.detail for f in found.values())


def test_what_nobody_asked_for_has_no_gate():
    assert statuses(Cluster(collectives={"size_factor": 64, "variants": []})) == {}
    ring = statuses(Cluster(collectives={"size_factor": 64, "variants": ["ring"]}))
    assert "ring" in ring
    assert not [gate for gate in ring if gate.startswith("rail")]


def test_an_adapter_that_nccl_does_not_use_or_that_is_down_somewhere_is_no_rail():
    cluster = Cluster()
    ports = cluster.records["inventory"][0].facts["infiniband"]
    storage = ports[0] | {"device": "mlx5_8"}
    down = [p | {"state": "DOWN"} if p["device"] == "mlx5_2" else p for p in ports]
    cluster.fact("inventory", "infiniband", [*ports, storage], 0)
    cluster.fact("inventory", "infiniband", [*down, storage], 8)
    assert rails_of(cluster.evidence) == [rail for rail in RAILS if rail != "mlx5_2"]
    one = Cluster()
    one.fact("collectives", "transport", {"network": "IB", "adapters": ["mlx5_0"], "channels": {}})
    assert "NCCL uses mlx5_0 of the active InfiniBand adapters" in variants_of(one.evidence)["rails"]
    roce = Cluster()
    roce.fact("inventory", "infiniband", [p | {"link_layer": "Ethernet"} for p in ports], 0, 8)
    assert "NCCL uses none" in variants_of(roce.evidence)["rails"]


def test_rails_are_ordered_by_their_numbers_and_one_name_is_no_beginning_of_another():
    cluster = Cluster()
    ports = cluster.records["inventory"][0].facts["infiniband"]
    cluster.fact(
        "inventory", "infiniband", [ports[0] | {"device": name} for name in ("mlx5_1", "mlx5_10", "mlx5_2")], 0, 8
    )
    cluster.fact("collectives", "transport", {"network": "IB", "adapters": ["mlx5_10", "mlx5_2", "mlx5_1"]})
    rails = variants_of(cluster.evidence)["rails"]
    assert [dict(v.environment) for v in rails] == [
        {"NCCL_IB_HCA": "=mlx5_1"}, {"NCCL_IB_HCA": "=mlx5_2"}, {"NCCL_IB_HCA": "=mlx5_10"},
    ]  # fmt: skip


class Launches:
    """In place of the pool: keeps each job and leaves the records of a sound cluster, as its ranks would."""

    def __init__(self, cluster: Cluster, ends: dict[str, JobState]) -> None:
        self.jobs: list[JobSpec] = []
        self._cluster, self._ends = cluster, ends

    def __call__(self, run: CheckRun, name: str, job: JobSpec) -> None:
        self.jobs.append(job)
        attempt = Path(job.folder) / "001"
        attempt.mkdir(parents=True)
        (attempt / "spec.json").write_text("{}")
        variant = job.arguments.get("variant")
        if (state := self._ends.get(variant["name"] if variant else "")) is not None:
            raise JobFailed(job.name, state, JobError("NCCL error", kind=FailureKind.TRANSIENT))
        records = self._cluster.variants[variant["name"]] if variant else self._cluster.records["collectives"]
        self.leave(attempt, records)

    @staticmethod
    def leave(attempt: Path, records: list[RankRecord]) -> None:
        attempt.mkdir(parents=True, exist_ok=True)
        (attempt / "spec.json").write_text("{}")
        for record in records:
            (attempt / f"rank-{record.rank:05d}.json").write_text(record.model_dump_json())


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """The stage of collectives, with every job that it launches."""
    monkeypatch.setattr(check_cluster, "get_run_logger", lambda: logging.getLogger("test"))

    def launch(cluster: Cluster, ends: dict[str, JobState] | None = None) -> tuple[StageOutcome, list[JobSpec]]:
        check = cluster.check.model_copy(update={"storage": StorageSettings(shared=str(tmp_path))})
        folder = CheckFolder(check.storage, "night")
        Launches.leave(folder.job("inventory") / "001", cluster.records["inventory"])
        launches = Launches(cluster, ends or {})
        monkeypatch.setattr(check_cluster, "run_stage", launches)
        run = CheckRun(check, folder, None, "", threading.Event())
        before = {stage: StageOutcome(stage=stage, state="done") for stage in ("inventory", "devices")}
        return measure.fn(run, "collectives", before), launches.jobs

    return launch


def test_each_variant_is_a_launch_with_exactly_its_variable_after_the_stages_own(launched):
    outcome, jobs = launched(Cluster())
    told = [job.arguments.get("variant", {}).get("environment") for job in jobs]
    assert told == [None, {"NCCL_ALGO": "Ring"}, *({"NCCL_IB_HCA": f"={rail}"} for rail in RAILS)]
    assert len({job.name for job in jobs}) == len({job.folder for job in jobs}) == len(jobs)
    # All ranks of all nodes, as the stage itself.
    assert {(job.num_nodes, job.processes_per_node, job.gpus, job.module) for job in jobs} == {
        (2, 8, True, "tasks.cluster")
    }
    assert [(v.name, v.state) for v in outcome.variants] == [("ring", "done"), *((f"rail {r}", "done") for r in RAILS)]
    assert outcome.state == "done"
    json.dumps([dict(job.arguments) for job in jobs])


def test_a_rail_that_fails_ends_neither_the_stage_nor_the_rails_after_it(launched):
    bad = ["rail mlx5_0", "rail mlx5_7"]
    outcome, jobs = launched(Cluster(), dict.fromkeys(bad, JobState.FAILED))
    assert (outcome.state, len(jobs)) == ("done", 10)
    assert [v.name for v in outcome.variants if v.state == "failed"] == bad
    assert [v.error for v in outcome.variants if v.name in bad] == ["NCCL error"] * 2


def test_where_the_pool_is_taken_meanwhile_the_rest_does_not_wait_as_well(launched):
    outcome, jobs = launched(Cluster(), {"rail mlx5_1": JobState.QUEUED})
    assert [job.arguments["variant"]["name"] for job in jobs[1:]] == ["ring", "rail mlx5_0", "rail mlx5_1"]
    assert [v.name for v in outcome.variants if v.state == "yielded"] == [f"rail {rail}" for rail in RAILS[1:]]


def test_after_collectives_that_failed_no_variant_is_tried(launched):
    cluster = Cluster()
    outcome, jobs = launched(cluster, {"": JobState.FAILED})
    assert (outcome.state, outcome.variants, len(jobs)) == ("failed", (), 1)
    cluster.outcomes["collectives"], cluster.variants = outcome, {}
    assert {gate: status for gate, status in statuses(cluster).items() if gate in ("ring", "rails")} == {
        "ring": Status.SKIP, "rails": Status.SKIP,
    }  # fmt: skip


def test_on_processors_nothing_more_is_launched(launched):
    outcome, jobs = launched(Cluster(gpus=False))
    assert len(jobs) == 1
    assert outcome.variants == ()


@pytest.mark.integration
def test_the_ranks_set_the_variables_over_the_jobs_own_and_leave_the_variants_figures_alone(tmp_path):
    """A pool's env often names NCCL_IB_HCA, and goes over a job's: every rail would then have been the same measurement."""
    pool = {"num_nodes": 1, "processes_per_node": 2, "gpus": False, "max_retries": 0}
    check = ClusterCheck(pool=pool, collectives={"max_mib": 0.001, "num_repeats": 3})
    variant = {"name": "rail mlx5_3", "environment": {"NCCL_IB_HCA": "=mlx5_3"}, "prefix": "rail_", "rail": "mlx5_3",
               "operations": ["all_reduce"], "sizes_bytes": [1024]}  # fmt: skip
    job = variant_probe_job(check, CheckFolder(StorageSettings(shared=str(tmp_path)), "x"), "collectives_x", variant)
    attempt = tmp_path / "001"
    attempt.mkdir()
    (attempt / "spec.json").write_text(json.dumps({"folder": str(attempt), "arguments": dict(job.arguments)}))
    (tmp_path / "NEWEST").write_text("001")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--module"]
    done = subprocess.run(
        [*command, "tasks.cluster", str(attempt / "spec.json")], cwd=REPOSITORY, capture_output=True, text=True, timeout=200,
        env={"PATH": "/usr/bin:/bin", "NODE_RANK": "0", "NCCL_IB_HCA": "mlx5", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records, _ = read_records(attempt)
    assert [record.facts["environment"] for record in records] == [{"NCCL_IB_HCA": "=mlx5_3"}] * 2
    names = {figure.name for record in records for figure in record.figures}
    assert names == {"rail_all_reduce_s", "rail_all_reduce_algbw_gbytes_per_s", "rail_all_reduce_busbw_gbytes_per_s"}
