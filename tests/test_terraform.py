"""infra/terraform without a cloud: it parses, what it refers to is declared, and every attribute is one the provider has."""

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hcl2
import pytest

from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "infra" / "terraform" / "nebius"
FILES = sorted(FOLDER.glob("*.tf"))

# Read in the provider's documentation (docs/resources and docs/data-sources of terraform-provider-nebius, 0.6.x).
COMMON = {"parent_id", "name", "labels"}
KNOWN = {
    "nebius_vpc_v1_network": COMMON,
    "nebius_vpc_v1_subnet": COMMON | {"network_id", "ipv4_private_pools", "ipv4_public_pools", "route_table_id"},
    "nebius_compute_v1_filesystem": COMMON
    | {"type", "size_gibibytes", "size_bytes", "block_size_bytes", "forbid_deletion"},
    "nebius_compute_v1_disk": COMMON | {"type", "size_gibibytes", "size_bytes", "block_size_bytes", "forbid_deletion"},
    "nebius_compute_v1_gpu_cluster": COMMON | {"infiniband_fabric"},
    "nebius_storage_v1_bucket": COMMON
    | {"versioning_policy", "lifecycle_configuration", "bucket_policy", "default_storage_class", "max_size_bytes"},
    "nebius_registry_v1_registry": COMMON | {"description"},
    "nebius_iam_v1_service_account": COMMON | {"description"},
    "nebius_iam_v1_group": COMMON,
    "nebius_iam_v1_group_membership": COMMON | {"member_id"},
    "nebius_iam_v1_access_permit": COMMON | {"resource_id", "role"},
    "nebius_iam_v2_access_key": COMMON | {"account", "secret_delivery_mode", "description", "expires_at"},
    "nebius_mk8s_v1_cluster": COMMON | {"control_plane", "kube_network"},
    "nebius_mk8s_v1_node_group": COMMON
    | {"template", "autoscaling", "fixed_node_count", "strategy", "version", "auto_repair"},
    "nebius_quotas_v1_quota_allowance": {"by_name_in_region", "id"},
}
# Of nested attributes, those that we write and their neighbours; a leaf is None, or the values that the provider takes.
NESTED: dict[str, dict[str, Any]] = {
    "nebius_vpc_v1_subnet": {"ipv4_private_pools": {"use_network_pools": None, "pools": {}}},
    "nebius_mk8s_v1_cluster": {
        "control_plane": {
            "subnet_id": None,
            "version": None,
            "etcd_cluster_size": None,
            "audit_logs": {},
            "karpenter": {},
            "endpoints": {"public_endpoint": {"allowed_cidrs": None}},
        },
        "kube_network": {"service_cidrs": None},
    },
    "nebius_mk8s_v1_node_group": {
        "autoscaling": {"min_node_count": None, "max_node_count": None},
        "strategy": {
            "max_surge": {"count": None, "percent": None},
            "max_unavailable": {"count": None, "percent": None},
            "drain_timeout": None,
        },
        "template": {
            "resources": {"platform": None, "preset": None},
            "boot_disk": {
                "type": {"NETWORK_SSD", "NETWORK_HDD", "NETWORK_SSD_IO_M3", "NETWORK_SSD_NON_REPLICATED"},
                "size_gibibytes": None,
                "size_bytes": None,
                "block_size_bytes": None,
            },
            "filesystems": {
                "attach_mode": {"READ_ONLY", "READ_WRITE"},
                "mount_tag": None,
                "existing_filesystem": {"id": None},
            },
            "gpu_cluster": {"id": None},
            "gpu_settings": {"drivers_preset": None},
            "metadata": {"labels": None},
            "network_interfaces": {"subnet_id": None, "public_ip_address": {}, "security_groups": {"id": None}},
            "taints": {
                "key": None,
                "value": None,
                "effect": {"NO_EXECUTE", "NO_SCHEDULE", "PREFER_NO_SCHEDULE"},
            },
            "service_account_id": None,
            "cloud_init_user_data": None,
            "preemptible": {},
            "reservation_policy": {"policy": {"AUTO", "FORBID", "STRICT"}, "reservation_ids": None},
            "local_disks": {},
            "max_pods": None,
            "os": None,
            "nvlink": {"nvl_instance_group_id": None},
        },
    },
    "nebius_storage_v1_bucket": {
        "versioning_policy": {"DISABLED", "ENABLED", "SUSPENDED"},
        "lifecycle_configuration": {
            "rules": {
                "id": None,
                "status": {"ENABLED", "DISABLED"},
                "filter": {"prefix": None},
                "noncurrent_version_expiration": {"noncurrent_days": None, "newer_noncurrent_versions": None},
                "expiration": {"days": None, "date": None, "expired_object_delete_marker": None},
                "abort_incomplete_multipart_upload": {"days_after_initiation": None},
            },
        },
        "bucket_policy": {"rules": {"group_id": None, "anonymous": {}, "paths": None, "roles": None}},
    },
    "nebius_iam_v2_access_key": {
        "secret_delivery_mode": {"INLINE", "MYSTERY_BOX", "EXPLICIT"},
        "account": {"service_account": {"id": None}, "user_account": {"id": None}, "anonymous_account": {}},
    },
}
META = {"lifecycle", "count", "for_each", "depends_on", "provider"}


def plain(name: str) -> str:
    return name.strip('"')


def entries(text: str, kind: str) -> list[tuple[str, ...]]:
    """Labels of every block of that kind: ``("nebius_vpc_v1_subnet", "this")``."""
    return [
        tuple(plain(label) for label in re.findall(r'"[^"]+"', line))
        for line in re.findall(rf"^{kind} .*\{{", text, re.M)
    ]


def problems(text: str) -> list[str]:
    """Of the whole configuration as one text."""
    parsed = hcl2.loads(text)
    found = []
    code = re.sub(r"#[^\n]*", "", text)
    variables = {labels[0] for labels in entries(text, "variable")}
    resources = {".".join(labels) for labels in entries(text, "resource")}
    data = {".".join(("data", *labels)) for labels in entries(text, "data")}
    locals_ = {plain(name) for block in parsed.get("locals", []) for name in block if not name.startswith("__")}
    used = set(re.findall(r"\bvar\.(\w+)", code))
    found += [f"var.{name} is not declared" for name in used - variables]
    found += [f"variable {name} is used nowhere" for name in variables - used]
    found += [f"local.{name} is not declared" for name in set(re.findall(r"\blocal\.(\w+)", code)) - locals_]
    for reference in set(re.findall(r"(?<![\w\"./-])((?:data\.)?nebius_\w+\.\w+)", code)):
        if reference not in resources | data:
            found.append(f"{reference} is not declared")
    for kind in ("resource", "data"):
        for block in parsed.get(kind, []):
            for type_, named in block.items():
                for name, body in named.items():
                    known = KNOWN.get(plain(type_))
                    if known is None:
                        found.append(f"{plain(type_)} was never looked up")
                        continue
                    attributes = {plain(a) for a in body if not a.startswith("__")} - META
                    found += [f"{plain(type_)}.{plain(name)} has no attribute {a}" for a in attributes - known]
    values = {plain(name): value for block in parsed.get("locals", []) for name, value in block.items()}
    for block in parsed.get("resource", []):
        for type_, named in block.items():
            for body in named.values():
                for attribute, known in NESTED.get(plain(type_), {}).items():
                    if attribute in body:
                        found += unknown_within(attribute, body[attribute], known, values)
    return found


def unknown_within(where: str, value: Any, known: Any, values: Mapping[str, Any]) -> list[str]:
    """Names that the provider does not know at any depth, and values that it does not take.

    Args:
        known: of :data:`NESTED`.
        values: of ``local.*``, which stand for what they are set to.
    """
    if isinstance(value, str) and (name := re.fullmatch(r"\$\{local\.(\w+)\}", value)):
        # One that is not declared is told by itself.
        value = values.get(name[1])
    if isinstance(value, list) and known is not None:
        return [problem for entry in value for problem in unknown_within(where, entry, known, values)]
    if isinstance(known, set):
        is_literal = isinstance(value, str) and "${" not in value
        return [f"{where} = {value} is none of the provider's"] if is_literal and plain(value) not in known else []
    if known is None or not isinstance(value, dict):
        return []
    inner = {plain(name): part for name, part in value.items() if not name.startswith("__")}
    return [f"{where} has no attribute {name}" for name in inner.keys() - known.keys()] + [
        problem
        for name in inner.keys() & known.keys()
        for problem in unknown_within(f"{where}.{name}", inner[name], known[name], values)
    ]


def whole() -> str:
    return "\n".join(file.read_text() for file in FILES)


def test_everything_that_is_used_is_declared_and_known_to_the_provider():
    assert problems(whole()) == []


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("var.infiniband_fabric", "var.infiniband_fabrics", "var.infiniband_fabrics is not declared"),
        ("local.mount_tag", "local.mount", "local.mount is not declared"),
        ("nebius_vpc_v1_subnet.this.id", "nebius_vpc_v1_subnet.main.id", "nebius_vpc_v1_subnet.main is not declared"),
        ("  infiniband_fabric = var", "  infiniband_fabrics = var", "has no attribute infiniband_fabrics"),
        ("gpu_settings = {", "gpu_setting = {", "template has no attribute gpu_setting"),
        ("preset   = var.gpu_preset", "presets  = var.gpu_preset", "template.resources has no attribute presets"),
        ("existing_filesystem =", "filesystem =", "template.filesystems has no attribute filesystem"),
        (
            'effect = "NO_SCHEDULE"',
            'effect = "NoSchedule"',
            'template.taints.effect = "NoSchedule" is none of the provider\'s',
        ),
        ('= "READ_WRITE"', '= "RW"', "template.filesystems.attach_mode"),
        ("max_surge       = { count", "max_surge       = { nodes", "strategy.max_surge has no attribute nodes"),
        ("allowed_cidrs = var", "cidrs = var", "control_plane.endpoints.public_endpoint has no attribute cidrs"),
        (
            "noncurrent_days =",
            "days =",
            "lifecycle_configuration.rules.noncurrent_version_expiration has no attribute days",
        ),
        ('= "MYSTERY_BOX"', '= "MYSTERYBOX"', "secret_delivery_mode"),
        (
            'resource "nebius_compute_v1_disk"',
            'resource "nebius_compute_v2_disk"',
            "nebius_compute_v2_disk was never looked up",
        ),
    ],
)
def test_each_rule_can_be_broken(before, after, said):
    text = whole()
    assert before in text
    assert any(said in problem for problem in problems(text.replace(before, after)))


def test_terraform_1_8_is_required_and_the_provider_pinned():
    [settings] = hcl2.loads((FOLDER / "versions.tf").read_text())["terraform"]
    assert plain(settings["required_version"]) == ">= 1.8.0"
    assert "< 0.7.0" in (FOLDER / "versions.tf").read_text()


def test_the_present_clusters_size_and_storage_are_the_defaults():
    text = (FOLDER / "variables.tf").read_text()
    assert "{ min = 2, max = 2 }" in text
    assert text.count("default     = 2048") == 2
    assert "<= 5120" in text


def test_a_quota_that_our_own_filesystem_uses_up_warns_and_stops_no_later_plan():
    text = whole()
    using = [
        block for block in ("precondition", "postcondition") if re.search(rf"{block} \{{[^}}]*filesystem_free", text)
    ]
    assert using == []
    [check] = hcl2.loads((FOLDER / "quotas.tf").read_text())["check"]
    [(name, body)] = [(plain(name), body) for name, body in check.items() if not name.startswith("__")]
    assert name == "filesystem_quota"
    assert "local.filesystem_free_bytes" in str(body["assert"])


def test_what_terraform_writes_beside_its_files_is_no_commit():
    # A plan holds the state and every variable in plain text; the README's command writes it there.
    assert "plan -out plan" in (FOLDER / "README.md").read_text()
    names = [
        f"infra/terraform/nebius/{name}" for name in ("plan", "our.tfplan", "terraform.tfvars", "terraform.tfstate")
    ]
    done = subprocess.run(["git", "check-ignore", "--no-index", *names], cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode == 128:
        pytest.skip("not a checkout of git")
    assert done.stdout.split() == names


def test_no_credential_stands_in_a_file():
    for file in [*FOLDER.iterdir()]:
        if file.is_file():
            assert not re.search(r"(secret_key|private_key|token|password)\s*=\s*\"[^\"]", file.read_text()), file


@pytest.mark.skipif(not shutil.which("terraform"), reason="no terraform here; CI has one")
def test_files_are_as_terraform_fmt_writes_them():
    done = subprocess.run(["terraform", "fmt", "-check", "-recursive", FOLDER.parent], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def envrc(tmp_path: Path, **values: str) -> subprocess.CompletedProcess:
    text = (FOLDER / ".envrc.example").read_text()
    for name, value in values.items():
        text = text.replace(f'{name}=""', f'{name}="{value}"')
    text = text.replace('"$HOME/.config/nebius/state-key"', f'"{tmp_path}/state-key"')
    (tmp_path / "envrc").write_text(text)
    return subprocess.run(
        ["bash", "-c", f". {tmp_path}/envrc; echo status=$? sa=$NB_SA_ID secret=${{AWS_SECRET_ACCESS_KEY:-none}}"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )


def test_the_environment_file_exports_nothing_unless_everything_is_usable(tmp_path):
    nothing = envrc(tmp_path)
    assert "status=1 sa= secret=none" in nothing.stdout
    assert "sa_id must be serviceaccount-" in nothing.stderr
    for name in ("key", "state-key"):
        (tmp_path / name).write_text("planted")
        (tmp_path / name).chmod(0o644)
    good = {
        "sa_id": "serviceaccount-1",
        "public_key_id": "publickey-1",
        "private_key_path": f"{tmp_path}/key",
        "state_key_id": "k",
    }
    readable = envrc(tmp_path, **good)
    assert "others may read" in readable.stderr
    assert "sa= secret=none" in readable.stdout
    for name in ("key", "state-key"):
        (tmp_path / name).chmod(0o600)
    assert "status=0 sa=serviceaccount-1 secret=planted" in envrc(tmp_path, **good).stdout
