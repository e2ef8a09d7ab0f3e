# Nodes pull images; MLflow writes artifacts. Neither can do what the other can, and neither can change the cluster.
resource "nebius_iam_v1_service_account" "nodes" {
  parent_id   = var.project_id
  name        = "${var.name}-nodes"
  description = "Pulls images"
}

resource "nebius_iam_v1_group" "nodes" {
  parent_id = var.tenant_id
  name      = "${var.name}-nodes"
}

resource "nebius_iam_v1_group_membership" "nodes" {
  parent_id = nebius_iam_v1_group.nodes.id
  member_id = nebius_iam_v1_service_account.nodes.id
}

resource "nebius_iam_v1_access_permit" "pull_images" {
  parent_id   = nebius_iam_v1_group.nodes.id
  resource_id = nebius_registry_v1_registry.images.id
  role        = "viewer"
}

resource "nebius_iam_v1_service_account" "artifacts" {
  parent_id   = var.project_id
  name        = "${var.name}-artifacts"
  description = "Reads and writes MLflow's artifacts"
}

resource "nebius_iam_v1_group" "artifacts" {
  parent_id = var.tenant_id
  name      = "${var.name}-artifacts"
}

resource "nebius_iam_v1_group_membership" "artifacts" {
  parent_id = nebius_iam_v1_group.artifacts.id
  member_id = nebius_iam_v1_service_account.artifacts.id
}

# Its secret goes into MysteryBox and not into the state.
resource "nebius_iam_v2_access_key" "artifacts" {
  parent_id            = var.project_id
  name                 = "${var.name}-artifacts"
  secret_delivery_mode = "MYSTERY_BOX"

  account = {
    service_account = {
      id = nebius_iam_v1_service_account.artifacts.id
    }
  }
}
