locals {
  mount_tag = "shared"
  # The shared filesystem on every node, where csi-mounted-fs-path finds it (README).
  cloud_init = yamlencode({
    users = var.ssh_public_key == null ? [] : [
      { name = "ubuntu", sudo = "ALL=(ALL) NOPASSWD:ALL", shell = "/bin/bash", ssh_authorized_keys = [var.ssh_public_key] },
    ]
    runcmd = [
      "mkdir -p /mnt/data",
      "grep -q '^${local.mount_tag} ' /etc/fstab || echo '${local.mount_tag} /mnt/data virtiofs defaults,nofail 0 2' >> /etc/fstab",
      "mount -a",
    ]
  })
  filesystems = [
    {
      attach_mode         = "READ_WRITE"
      mount_tag           = local.mount_tag
      existing_filesystem = { id = nebius_compute_v1_filesystem.shared.id }
    },
  ]
}

resource "nebius_mk8s_v1_cluster" "this" {
  parent_id = var.project_id
  name      = var.name

  control_plane = {
    subnet_id         = nebius_vpc_v1_subnet.this.id
    version           = var.kubernetes_version
    etcd_cluster_size = 3
    audit_logs        = {}
    endpoints = {
      public_endpoint = {
        allowed_cidrs = var.api_allowed_cidrs
      }
    }
  }
}

resource "nebius_compute_v1_gpu_cluster" "this" {
  parent_id         = var.project_id
  name              = var.name
  infiniband_fabric = var.infiniband_fabric
}

resource "nebius_mk8s_v1_node_group" "gpu" {
  parent_id = nebius_mk8s_v1_cluster.this.id
  name      = "gpu"
  version   = var.kubernetes_version

  autoscaling = {
    min_node_count = var.gpu_nodes.min
    max_node_count = var.gpu_nodes.max
  }

  # GPUs beyond the two nodes are not to be had for an update: one node after the other is replaced.
  strategy = {
    max_surge       = { count = 0 }
    max_unavailable = { count = 1 }
    drain_timeout   = "30m"
  }

  template = {
    resources = {
      platform = var.gpu_platform
      preset   = var.gpu_preset
    }
    boot_disk = {
      type           = "NETWORK_SSD"
      size_gibibytes = 512
    }
    gpu_cluster = {
      id = nebius_compute_v1_gpu_cluster.this.id
    }
    gpu_settings = {
      drivers_preset = var.gpu_drivers_preset
    }
    metadata = {
      labels = { "proving-ground/pool" = "gpu" }
    }
    taints = [
      { key = "nvidia.com/gpu", value = "true", effect = "NO_SCHEDULE" },
    ]
    network_interfaces   = [{ subnet_id = nebius_vpc_v1_subnet.this.id }]
    filesystems          = local.filesystems
    service_account_id   = nebius_iam_v1_service_account.nodes.id
    cloud_init_user_data = local.cloud_init
  }
}

resource "nebius_mk8s_v1_node_group" "cpu" {
  parent_id = nebius_mk8s_v1_cluster.this.id
  name      = "cpu"
  version   = var.kubernetes_version

  autoscaling = {
    min_node_count = var.cpu_nodes.min
    max_node_count = var.cpu_nodes.max
  }

  template = {
    resources = {
      platform = var.cpu_platform
      preset   = var.cpu_preset
    }
    boot_disk = {
      type           = "NETWORK_SSD"
      size_gibibytes = 128
    }
    metadata = {
      labels = { "proving-ground/pool" = "cpu" }
    }
    network_interfaces   = [{ subnet_id = nebius_vpc_v1_subnet.this.id }]
    filesystems          = local.filesystems
    service_account_id   = nebius_iam_v1_service_account.nodes.id
    cloud_init_user_data = local.cloud_init
  }
}
