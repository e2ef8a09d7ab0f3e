"""The tree of PCIe bridges, from trees as Linux lays them out: host bridge, root port, a switch's ports, the device."""

from pathlib import Path

import pytest

from tasks.contracts.cluster_report import Status
from tasks.hardware.topology import near
from tests.cluster.clusters import TOPOLOGY, Cluster


class Tree:
    def __init__(self, root: Path) -> None:
        self.sysfs = root
        (root / "bus/pci/devices").mkdir(parents=True)
        (root / "class/infiniband").mkdir(parents=True)

    def add(
        self, path: str, numa_node: int | None, *, kind: str = "0x030200", vendor: str = "0x10de", adapter: str = ""
    ) -> None:
        """A device at a path below /sys/devices, a GPU unless told otherwise."""
        folder = self.sysfs / "devices" / path
        folder.mkdir(parents=True)
        if numa_node is not None:
            (folder / "numa_node").write_text(f"{numa_node}\n")
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "class").write_text(f"{kind}\n")
        (self.sysfs / "bus/pci/devices" / folder.name).symlink_to(folder)
        if adapter:
            of_adapter = self.sysfs / "class/infiniband" / adapter
            of_adapter.mkdir()
            (of_adapter / "device").symlink_to(folder)

    def add_adapter(self, path: str, numa_node: int | None) -> None:
        self.add(path, numa_node, kind="0x020700", vendor="0x15b3", adapter="mlx5_0")


SWITCH = "pci0000:15/0000:15:01.0/0000:16:00.0"


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


@pytest.mark.parametrize(
    ("adapter", "numa_node", "level"),
    [
        (f"{SWITCH}/0000:17:01.0/0000:19:00.0", 0, "PIX"),
        (f"{SWITCH}/0000:17:01.0/0000:1a:00.0/0000:1b:00.0/0000:1c:00.0", 0, "PXB"),
        ("pci0000:15/0000:15:02.0/0000:20:00.0", 0, "PHB"),
        ("pci0000:37/0000:37:01.0/0000:38:00.0", 0, "NODE"),
        ("pci0000:97/0000:97:01.0/0000:98:00.0", 1, "SYS"),
        ("pci0000:97/0000:97:01.0/0000:98:00.0", None, "SYS"),
    ],
)
def test_an_adapter_is_as_near_as_what_lies_between(tree, adapter, numa_node, level):
    tree.add(f"{SWITCH}/0000:17:00.0/0000:18:00.0", 0)
    tree.add_adapter(adapter, numa_node)
    assert near(tree.sysfs) == [{"bus_id": "0000:18:00.0", "gpus": {}, "adapters": {level: 1}}]


def test_gpus_are_counted_by_how_near_they_are_and_never_with_themselves(tree):
    tree.add(f"{SWITCH}/0000:17:00.0/0000:18:00.0", 0)
    tree.add("pci0000:37/0000:37:01.0/0000:38:00.0", 0)
    tree.add("pci0000:97/0000:97:01.0/0000:98:00.0", 1, kind="0x030000")
    assert [gpu["gpus"] for gpu in near(tree.sysfs)] == [{"NODE": 1, "SYS": 1}, {"NODE": 1, "SYS": 1}, {"SYS": 2}]


def test_on_a_machine_of_one_socket_that_numbers_no_node_all_are_on_it(tree):
    tree.add("pci0000:15/0000:15:01.0/0000:18:00.0", -1)
    tree.add_adapter("pci0000:37/0000:37:01.0/0000:38:00.0", -1)
    assert near(tree.sysfs)[0]["adapters"] == {"NODE": 1}


def test_what_is_no_gpu_or_hangs_on_no_bus_is_left_out(tree):
    tree.add("pci0000:15/0000:15:01.0/0000:18:00.0", 0)
    # An NVSwitch, another maker's GPU, a GPU on no PCIe bus, an adapter of software alone.
    tree.add("pci0000:15/0000:15:02.0/0000:19:00.0", 0, kind="0x068000")
    tree.add("pci0000:15/0000:15:03.0/0000:1a:00.0", 0, vendor="0x1002")
    tree.add("platform/0000:1b:00.0", 0)
    (tree.sysfs / "class/infiniband/rxe0").mkdir()
    assert near(tree.sysfs) == [{"bus_id": "0000:18:00.0", "gpus": {}, "adapters": {}}]


def test_a_tree_that_is_not_shown_tells_nothing(tmp_path):
    assert near(tmp_path) == []


def test_a_node_whose_adapters_sit_elsewhere_is_named():
    cluster = Cluster(3, 8)
    moved = TOPOLOGY | {"adapters": {"PIX": 0, "SYS": 8}}
    cluster.fact("inventory", "topology", [*[TOPOLOGY] * 7, moved], 8)
    finding = cluster.bad()["inventory/equal_topology"]
    assert (finding.status, finding.culprits) == (Status.WARN, ("host-1",))
    assert (
        "7 x (adapters 1 PIX 7 SYS; GPUs 7 SYS), 1 x (adapters 0 PIX 8 SYS; GPUs 7 SYS), the others 8 x ("
        in finding.detail
    )


@pytest.mark.parametrize("num_others", [1, 4])
def test_the_same_gpus_in_another_order_are_no_fault(num_others):
    """Nodes may number their buses in another order."""
    cluster = Cluster()
    others = [TOPOLOGY | {"adapters": {"SYS": 8}}] * num_others
    cluster.fact("inventory", "topology", [*others, *[TOPOLOGY] * (8 - num_others)], 0)
    cluster.fact("inventory", "topology", [*[TOPOLOGY] * (8 - num_others), *others], 8)
    assert "inventory/equal_topology" not in cluster.bad()


@pytest.mark.parametrize("told", [[], [None] * 8, None, "near", [7]])
def test_a_node_alone_that_does_not_tell_is_named_and_a_cluster_that_does_not_is_not_judged(told):
    cluster = Cluster()
    cluster.fact("inventory", "topology", told, 8)
    assert cluster.bad()["inventory/equal_topology"].culprits == ("host-1",)
    cluster.fact("inventory", "topology", told, 0)
    (finding,) = [f for f in cluster.findings() if f.gate == "equal_topology"]
    assert finding.status is Status.SKIP
    assert "tree of devices" in finding.detail
