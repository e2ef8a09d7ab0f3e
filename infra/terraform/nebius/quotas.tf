# What may still be made, told by the plan: an apply that ends half-way on a quota leaves GPUs that cost and cannot work.
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

# A warning, not a precondition: once the filesystem is there the quota counts it as used, and no later plan would pass.
check "filesystem_quota" {
  assert {
    condition     = local.filesystem_free_bytes >= var.filesystem_gibibytes * local.gibibyte
    error_message = "Less is free than filesystem_gibibytes: ask for more before the first apply; later the filesystem itself counts."
  }
}
