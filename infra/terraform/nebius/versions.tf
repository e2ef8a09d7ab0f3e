terraform {
  required_version = ">= 1.8.0"

  required_providers {
    nebius = {
      # Its registry is not one of HashiCorp's; `terraform init` asks registry.terraform.io for nebius/nebius.
      source  = "nebius/nebius"
      version = ">= 0.6.8, < 0.7.0"
    }
  }

  # State in object storage. Bucket, key, region, endpoint and locking come from backend.hcl (backend.hcl.example), credentials
  # from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY: terraform init -backend-config=backend.hcl
  backend "s3" {
    skip_credentials_validation = true
    skip_region_validation      = true
    skip_requesting_account_id  = true
    skip_metadata_api_check     = true
  }
}

# A service account whose names and key file stand in the environment (.envrc.example); nothing secret is a variable.
provider "nebius" {
  service_account = {
    account_id_env       = "NB_SA_ID"
    public_key_id_env    = "NB_AUTHKEY_PUBLIC_ID"
    private_key_file_env = "NB_AUTHKEY_PRIVATE_PATH"
  }
}
