resource "nebius_vpc_v1_network" "this" {
  parent_id = var.project_id
  name      = var.name
}

resource "nebius_vpc_v1_subnet" "this" {
  parent_id  = var.project_id
  name       = var.name
  network_id = nebius_vpc_v1_network.this.id

  ipv4_private_pools = {
    use_network_pools = true
  }
}
