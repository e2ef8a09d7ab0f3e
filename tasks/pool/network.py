"""Environment of the ranks for the network between nodes.

NCCL falls back to TCP without a word when it finds no fast fabric, at a hundredth of the bandwidth. A profile other than
``auto`` forbids that: the job fails and says so. Interfaces and devices are the cluster's own and belong in its ``env``
settings (``NCCL_IB_HCA``, ``NCCL_SOCKET_IFNAME``, ``NCCL_IB_GID_INDEX``), which win over these.

Source of the names: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html
"""

from tasks.contracts.pool_settings import NetworkProfile

_PROFILES: dict[NetworkProfile, dict[str, str]] = {
    "auto": {},
    # "IB" means NCCL's verbs transport, of InfiniBand and RoCE alike. Relaxed ordering is what virtual machines need for
    # full bandwidth (2: where the card can).
    "infiniband": {"NCCL_NET": "IB", "NCCL_IB_PCI_RELAXED_ORDERING": "2"},
    # RoCE v2 lives behind an entry of the GID table, which NCCL 2.21 and later choose by themselves when it is -1.
    "roce": {"NCCL_NET": "IB", "NCCL_IB_PCI_RELAXED_ORDERING": "2", "NCCL_IB_GID_INDEX": "-1"},
    "ethernet": {"NCCL_NET": "Socket", "NCCL_IB_DISABLE": "1"},
}


def network_environment(profile: NetworkProfile) -> dict[str, str]:
    """The variables of a profile."""
    return dict(_PROFILES[profile])
