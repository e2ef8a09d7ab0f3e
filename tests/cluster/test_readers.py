"""What drivers, kernels and NCCL tell, read from captured and hand-written outputs, whole, cut off and spoilt."""

import random
from pathlib import Path

import pytest

from tasks.cluster.evidence import read_records
from tasks.cluster.transport import read_transport
from tasks.contracts.cluster_report import RankRecord, StageOutcome, Status
from tasks.hardware.infiniband import ports
from tasks.hardware.reference import chip_of, chips, fabric_of, fabrics
from tasks.hardware.telemetry import reasons_of, summary
from tests.cluster.clusters import Cluster

CAPTURED = Path(__file__).parents[1] / "captured"


def test_nccl_over_infiniband_is_read_with_its_adapters_and_channels():
    transport = read_transport((CAPTURED / "nccl-infiniband.log").read_text().splitlines())
    assert transport.network == "IB"
    assert transport.adapters == ("mlx5_0", "mlx5_1", "mlx5_2", "mlx5_3")
    assert transport.channels == {"NET/IB": 3, "P2P": 2}


def test_tcp_in_place_of_the_fast_fabric_fails_and_names_the_node():
    cluster = Cluster()
    transport = read_transport((CAPTURED / "nccl-socket.log").read_text().splitlines())
    assert (transport.network, transport.channels) == ("Socket", {"NET/Socket": 2, "P2P": 2})
    cluster.fact("collectives", "transport", transport.facts(), 8)
    finding = cluster.bad()["collectives/transport"]
    assert (finding.status, finding.culprits) == (Status.FAIL, ("host-1",))
    assert "TCP" in finding.detail


def test_tcp_is_no_fault_where_the_settings_ask_for_it():
    cluster = Cluster(cluster_fabric="ethernet")
    transport = read_transport((CAPTURED / "nccl-socket.log").read_text().splitlines())
    cluster.fact("collectives", "transport", transport.facts())
    assert "collectives/transport" not in cluster.bad()


@pytest.mark.parametrize("facts", [None, "IB", {}, {"network": None, "adapters": [], "channels": {}}])
def test_a_transport_that_was_not_told_is_no_pass(facts):
    cluster = Cluster()
    cluster.fact("collectives", "transport", facts, 0)
    assert "host-0" in cluster.bad()["collectives/transport"].culprits


def test_fewer_adapters_than_on_other_nodes_are_named():
    cluster = Cluster()
    some = {"network": "IB", "adapters": ["mlx5_0"], "channels": {"NET/IB": 2}}
    cluster.fact("collectives", "transport", some, 8)
    assert cluster.bad()["collectives/transport"].culprits == ("host-1",)


def test_a_log_cut_anywhere_or_spoilt_never_reads_as_a_fast_fabric():
    draw = random.Random(1)
    text = (CAPTURED / "nccl-socket.log").read_text()
    for _ in range(200):
        cut = text[: draw.randrange(len(text))]
        at = draw.randrange(max(1, len(cut)))
        spoilt = cut[:at] + chr(draw.randrange(1, 0x2FFF)) + cut[at + 1 :]
        assert read_transport(spoilt.splitlines()).network != "IB"


def test_ports_are_read_and_what_cannot_be_is_none(tmp_path):
    port = tmp_path / "mlx5_0" / "ports" / "1"
    (port / "counters").mkdir(parents=True)
    for name, text in {"link_layer": "InfiniBand", "state": "4: ACTIVE", "rate": "400 Gb/sec (4X NDR)"}.items():
        (port / name).write_text(text + "\n")
    (port / "counters" / "link_downed").write_text("0\n")
    (port / "counters" / "symbol_error").write_text("many\n")
    (port / "hw_counters").mkdir()
    (port / "hw_counters" / "packet_seq_err").write_text("12\n")
    (tmp_path / "mlx5_1" / "ports" / "1").mkdir(parents=True)
    (tmp_path / "mlx5_1" / "ports" / "1" / "rate").write_text("schnell\n")
    first, second = ports(tmp_path)
    assert (first["device"], first["state"], first["rate_gbits_per_s"], first["link_downed"]) == (
        "mlx5_0",
        "ACTIVE",
        400.0,
        0,
    )
    assert (first["packet_seq_err"], first["symbol_error"], first["link_error_recovery"]) == (12, None, None)
    assert (second["state"], second["rate_gbits_per_s"], second["link_layer"]) == (None, None, None)
    assert ports(tmp_path / "absent") == []


def test_throttling_is_read_off_the_drivers_bits():
    assert reasons_of(0x1) == ()
    assert reasons_of(0x4) == ("software power cap",)
    assert reasons_of(0x8 | 0x40) == ("hardware slowdown", "hardware thermal slowdown")
    assert reasons_of(0x10000) == ("unknown reason 0x10000",)


def test_captured_telemetry_of_a_throttled_gpu_fails_it_and_a_power_cap_does_not():
    def sample(clock: float, bits: int) -> dict[str, float]:
        return {"sm_clock_mhz": clock, "power_watts": 690.0, "temperature_celsius": 86.0, "throttle_bits": bits}

    figures, reasons = summary([sample(1980, 0x4), sample(1410, 0x40), sample(1410, 0x44)])
    assert figures["sm_clock_mhz"] == 1410
    assert figures["throttled_share"] == pytest.approx(2 / 3)
    assert reasons == ("software power cap", "hardware thermal slowdown")
    assert summary([sample(1980, 0x4)])[0]["throttled_share"] == 0
    # Nothing sampled is nothing known: the figures are missing, and missing figures fail.
    assert summary([]) == ({}, ())


def test_a_record_that_cannot_be_read_is_told_and_no_other_is_lost(tmp_path):
    good = RankRecord(rank=0, world_size=3, node=0, process=0, host="a", doing="done", step=1)
    whole = good.model_dump_json()
    (tmp_path / "rank-00000.json").write_text(whole)
    (tmp_path / "rank-00001.json").write_text(whole[: len(whole) // 2])
    (tmp_path / "rank-00002.json").write_text('{"rank": "two"}')
    (tmp_path / "rank-x.json").write_text("{}")
    records, unreadable = read_records(tmp_path)
    assert [record.rank for record in records] == [0]
    assert [rank for rank, _ in unreadable] == [1, 2]


def test_every_chip_and_fabric_of_the_reference_can_be_read_and_refers_to_one_that_is_there():
    assert set(chips()) >= {"A100", "H100", "H200", "B200", "L40S", "CPU"}
    for name in chips():
        chip = chip_of(name)
        assert chip is not None
        assert chip.node_fabric in fabrics()
    for name in fabrics():
        fabric = fabric_of(name)
        assert fabric is not None
        assert fabric.source
        assert list(fabric.curve) == sorted(fabric.curve)


@pytest.mark.parametrize(
    ("device", "chip"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
    ],
)
def test_a_chip_is_known_by_the_drivers_name(device, chip):
    assert chip_of(device).name == chip


def test_the_reference_between_sizes_lies_between_and_below_the_first_there_is_none():
    fabric = fabric_of("nvlink4")
    assert fabric.all_reduce_gbytes_per_s(1 << 20, 4) == 66
    assert 66 < fabric.all_reduce_gbytes_per_s(8 << 20, 4) < 311
    assert fabric.all_reduce_gbytes_per_s(1 << 35, 4) == 363
    assert fabric.all_reduce_gbytes_per_s(1 << 10, 4) is None
    # Two have fewer steps at 1 MiB and fewer links at once at 4 GiB: what four reach accuses them.
    assert fabric.all_reduce_gbytes_per_s(1 << 20, 2) == 72
    assert fabric.all_reduce_gbytes_per_s(1 << 35, 2) == 345


@pytest.mark.parametrize("kept", [(), range(8)])
def test_a_transport_of_which_not_all_nodes_left_a_record_is_no_pass(kept):
    cluster = Cluster()
    cluster.outcomes["collectives"] = StageOutcome(
        stage="collectives", state="failed", error="lost", culprit_ranks=(9,)
    )
    cluster.records["collectives"] = [r for r in cluster.records["collectives"] if r.rank in kept]
    (finding,) = [f for f in cluster.findings() if f.gate == "transport"]
    assert (finding.status, finding.detail) == (Status.SKIP, f"known of {1 if kept else 0} of 2 nodes")
