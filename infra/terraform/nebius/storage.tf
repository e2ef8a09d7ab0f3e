# Models, data, checkpoints and results, seen by every node. Deleting the cluster leaves it: forbid_deletion.
resource "nebius_compute_v1_filesystem" "shared" {
  parent_id        = var.project_id
  name             = "${var.name}-shared"
  type             = "NETWORK_SSD"
  size_gibibytes   = var.filesystem_gibibytes
  block_size_bytes = 4096
  forbid_deletion  = true
}

resource "nebius_compute_v1_disk" "scratch" {
  parent_id      = var.project_id
  name           = "${var.name}-scratch"
  type           = "NETWORK_SSD"
  size_gibibytes = var.disk_gibibytes
}

# MLflow's artifacts and the backups of its databases; versions guard against deletion by mistake.
resource "nebius_storage_v1_bucket" "artifacts" {
  parent_id         = var.project_id
  name              = "${var.name}-artifacts"
  versioning_policy = "ENABLED"

  lifecycle_configuration = {
    rules = [
      {
        id     = "old-versions"
        status = "ENABLED"
        filter = { prefix = "" }
        noncurrent_version_expiration = {
          noncurrent_days = 30
        }
      },
    ]
  }

  bucket_policy = {
    rules = [
      {
        group_id = nebius_iam_v1_group.artifacts.id
        paths    = ["*"]
        roles    = ["storage.editor"]
      },
    ]
  }
}

resource "nebius_registry_v1_registry" "images" {
  parent_id   = var.project_id
  name        = var.name
  description = "Images of infra/docker"
}
