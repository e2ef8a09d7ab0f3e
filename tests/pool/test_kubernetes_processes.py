"""The Kubernetes pool on an emulated cluster whose pods are processes here: what every pool must do."""

import pytest

from tasks.contracts.kubernetes_settings import KubernetesSettings
from tasks.pool import kubernetes_api
from tasks.pool.kubernetes import KubernetesPool
from tests.pool.any_pool import AnyPool
from tests.pool.emulated_cluster import running_cluster
from tests.pool.emulated_nodes import Nodes

pytestmark = pytest.mark.integration


@pytest.fixture
def pool(tmp_path, monkeypatch):
    kubeconfig = tmp_path / "kubeconfig"
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    settings = KubernetesSettings(
        namespace="team",
        image="proving-ground",
        volumes=({"mount_path": str(tmp_path), "host_path": str(tmp_path)},),
        env={"GLOO_SOCKET_IFNAME": "lo"},
    )
    with running_cluster(kubeconfig) as cluster, Nodes(cluster):
        yield KubernetesPool(settings)
        kubernetes_api.open_api(None).close()


class TestKubernetesPool(AnyPool):
    """What every pool must do."""
