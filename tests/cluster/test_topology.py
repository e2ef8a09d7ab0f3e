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

    def add(self, path: str, numa_node: int | None, adapter: str = "") -> str:
        """A device at a path below /sys/devices; its bus id as NVML tells it."""
        folder = self.sysfs / "devices" / path
        folder.mkdir(parents=True)
        if numa_node is not None:
            (folder / "numa_node").write_text(f"{numa_node}\n")
        (self.sysfs / "bus/pci/devices" / folder.name).symlink_to(folder)
        if adapter:
            of_adapter = self.sysfs / "class/infiniband" / adapter
            of_adapter.mkdir()
            (of_adapter / "device").symlink_to(folder)
        return f"0000{folder.name}".upper()

    def near(self, *gpus: str | None):
        return near(gpus, sysfs=self.sysfs)


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
    gpu = tree.add(f"{SWITCH}/0000:17:00.0/0000:18:00.0", 0)
    tree.add(adapter, numa_node, "mlx5_0")
    assert tree.near(gpu) == [{"numa_node": 0, "gpus": {}, "adapters": {level: 1}}]


def test_gpus_are_counted_by_how_near_they_are_and_never_with_themselves(tree):
    first = tree.add(f"{SWITCH}/0000:17:00.0/0000:18:00.0", 0)
    second = tree.add("pci0000:37/0000:37:01.0/0000:38:00.0", 0)
    third = tree.add("pci0000:97/0000:97:01.0/0000:98:00.0", 1)
    told = tree.near(first, second, third)
    assert [gpu["gpus"] for gpu in told] == [{"NODE": 1, "SYS": 1}, {"NODE": 1, "SYS": 1}, {"SYS": 2}]


def test_on_a_machine_of_one_socket_that_numbers_no_node_all_are_on_it(tree):
    gpu = tree.add("pci0000:15/0000:15:01.0/0000:18:00.0", -1)
    tree.add("pci0000:37/0000:37:01.0/0000:38:00.0", -1, "mlx5_0")
    assert tree.near(gpu)[0]["adapters"] == {"NODE": 1}


def test_what_the_tree_does_not_show_is_not_told(tree):
    """A container may see no devices; an adapter of software alone hangs on no bus."""
    gpu = tree.add("pci0000:15/0000:15:01.0/0000:18:00.0", 0)
    (tree.sysfs / "class/infiniband/rxe0").mkdir()
    assert tree.near(gpu, "00000000:99:00.0", None) == [{"numa_node": 0, "gpus": {}, "adapters": {}}, None, None]


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


def test_the_same_gpus_in_another_order_are_no_fault():
    """A scheduler may give a job other GPUs of each node."""
    cluster = Cluster()
    other = TOPOLOGY | {"adapters": {"SYS": 8}}
    cluster.fact("inventory", "topology", [other, *[TOPOLOGY] * 7], 0)
    cluster.fact("inventory", "topology", [*[TOPOLOGY] * 7, other], 8)
    assert "inventory/equal_topology" not in cluster.bad()


@pytest.mark.parametrize("told", [[None] * 8, None, "near", [7]])
def test_a_node_alone_that_does_not_tell_is_named_and_a_cluster_that_does_not_is_not_judged(told):
    cluster = Cluster()
    cluster.fact("inventory", "topology", told, 8)
    assert cluster.bad()["inventory/equal_topology"].culprits == ("host-1",)
    cluster.fact("inventory", "topology", told, 0)
    (finding,) = [f for f in cluster.findings() if f.gate == "equal_topology"]
    assert finding.status is Status.SKIP
    assert "device tree" in finding.detail
