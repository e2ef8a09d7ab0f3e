output "cluster_id" {
  description = "nebius mk8s cluster get-credentials --id ... --external"
  value       = nebius_mk8s_v1_cluster.this.id
}

output "registry" {
  description = "Where images are pushed: registry/REGISTRY in infra/kubernetes/overlays/nebius."
  value       = "${nebius_registry_v1_registry.images.status.registry_fqdn}/${trimprefix(nebius_registry_v1_registry.images.id, "registry-")}"
}

output "artifacts_bucket" {
  description = "Bucket of MLflow's artifacts."
  value       = nebius_storage_v1_bucket.artifacts.name
}

output "artifacts_secret_reference" {
  description = "MysteryBox secret with the bucket's access key."
  value       = nebius_iam_v2_access_key.artifacts.status.secret_reference_id
}

output "filesystem_id" {
  description = "Shared filesystem; the Soperator variant takes it over."
  value       = nebius_compute_v1_filesystem.shared.id
}

output "scratch_disk_id" {
  description = "Network disk for logs and temporary files."
  value       = nebius_compute_v1_disk.scratch.id
}
