# What may still be made, read before anything is: an apply that ends half-way on a quota leaves GPUs that cost and cannot work.
locals {
  gibibyte              = 1024 * 1024 * 1024
  filesystem_quota      = data.nebius_quotas_v1_quota_allowance.filesystem
  filesystem_free_bytes = local.filesystem_quota.limit - local.filesystem_quota.status.usage
}

data "nebius_quotas_v1_quota_allowance" "filesystem" {
  by_name_in_region = {
    parent_id = var.tenant_id
    region    = var.region
    name      = "compute.filesystem.size.network-ssd"
  }
}
