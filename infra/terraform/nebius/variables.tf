variable "project_id" {
  description = "Project in which everything is made."
  type        = string
  nullable    = false
}

variable "tenant_id" {
  description = "Tenant of the project: whose quotas are read, and where groups of service accounts are."
  type        = string
  nullable    = false
}

variable "region" {
  description = "Region of the project, as eu-north1."
  type        = string
  default     = "eu-north1"
}

variable "name" {
  description = "Prefix of every name."
  type        = string
  default     = "proving-ground"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,30}[a-z0-9]$", var.name))
    error_message = "name: lower-case letters, digits and '-', 3 to 32 of them, beginning with a letter."
  }
}

variable "kubernetes_version" {
  description = "<major>.<minor> of the control plane and the nodes; the pool needs 1.31 or later."
  type        = string
  default     = "1.33"

  validation {
    condition     = tonumber(split(".", var.kubernetes_version)[1]) >= 31
    error_message = "kubernetes_version: jobs need Kubernetes 1.31 or later."
  }
}

variable "infiniband_fabric" {
  description = "Physical InfiniBand fabric of the GPU cluster, as fabric-6; which has room is told by Nebius. It fixes the platform's place."
  type        = string
  nullable    = false
}

variable "gpu_platform" {
  description = "Platform of the GPU nodes."
  type        = string
  default     = "gpu-h100-sxm"
}

variable "gpu_preset" {
  description = "Preset of the GPU nodes; InfiniBand wants whole machines of eight."
  type        = string
  default     = "8gpu-128vcpu-1600gb"

  validation {
    condition     = startswith(var.gpu_preset, "8gpu-")
    error_message = "gpu_preset: only machines of eight GPUs join a GPU cluster, as 8gpu-128vcpu-1600gb."
  }
}

variable "gpu_drivers_preset" {
  description = "Drivers on the GPU nodes' image; `nebius mk8s node-group get-compatibility-matrix` lists them. Null: none, for the GPU Operator."
  type        = string
  default     = "cuda12.8"
}

variable "gpu_nodes" {
  description = "GPU nodes, fewest and most: the autoscaler adds them for waiting jobs. 2 and 2: always two."
  type        = object({ min = number, max = number })
  default     = { min = 2, max = 2 }

  validation {
    condition     = var.gpu_nodes.min >= 0 && var.gpu_nodes.max >= var.gpu_nodes.min && var.gpu_nodes.max <= 64
    error_message = "gpu_nodes: 0 <= min <= max <= 64."
  }
}

variable "cpu_nodes" {
  description = "Nodes of servers, flows and dataset preparation, fewest and most."
  type        = object({ min = number, max = number })
  default     = { min = 2, max = 4 }
}

variable "cpu_platform" {
  description = "Platform of those nodes."
  type        = string
  default     = "cpu-d3"
}

variable "cpu_preset" {
  description = "Preset of those nodes."
  type        = string
  default     = "16vcpu-64gb"
}

variable "filesystem_gibibytes" {
  description = "Shared filesystem: models, data, checkpoints, results."
  type        = number
  default     = 2048

  validation {
    # A quota of 5 TiB for filesystems has stopped an apply half-way before.
    condition     = var.filesystem_gibibytes >= 100 && var.filesystem_gibibytes <= 5120
    error_message = "filesystem_gibibytes: 100 to 5120; more than 5 TiB needs a larger quota first, then a change of this limit."
  }
}

variable "disk_gibibytes" {
  description = "Network disk for logs and temporary files, attached where it is wanted; it survives its machine."
  type        = number
  default     = 2048
}

variable "api_allowed_cidrs" {
  description = "From where the Kubernetes API is reached. Empty would let everybody; so it may not be."
  type        = list(string)

  validation {
    condition     = length(var.api_allowed_cidrs) > 0 && !contains(var.api_allowed_cidrs, "0.0.0.0/0")
    error_message = "api_allowed_cidrs: name the networks of your people, not everybody's."
  }
}

variable "ssh_public_key" {
  description = "Public key that the nodes know, as ssh-ed25519 AAAA...; null: none."
  type        = string
  default     = null
}
