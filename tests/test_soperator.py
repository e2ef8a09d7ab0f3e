"""Our values for Nebius' recipe for Soperator: within the quota, known to the recipe, and no password that everybody knows."""

import os
import shutil
import subprocess
from pathlib import Path

import hcl2
import pytest

from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "infra" / "terraform" / "soperator"
EXAMPLE = FOLDER / "values.auto.tfvars.example"
# What the recipe's example gives a value to at 00c54d0, read there (soperator/installations/example/terraform.tfvars).
KNOWN = """
company_name production iam_merge_request_url controller_state_on_filestore filestore_controller_spool filesystem_jail
filesystem_jail_submounts filestore_accounting nfs_in_k8s slurm_operator_version slurm_operator_stable
slurm_nodesets_partitions slurm_partition_config_type slurm_nodeset_system sizing_tier_override slurm_nodeset_controller
slurm_nodeset_workers use_preinstalled_gpu_drivers slurm_nodeset_login slurm_nodeset_accounting slurm_nodeset_nfs
slurm_login_public_ip tailscale_enabled slurm_login_ssh_root_public_keys slurm_exporter_enabled active_checks_scope
slurm_shared_memory_size_gibibytes telemetry_enabled dcgm_exporter_enabled soperator_notifier nccl_inspector_profiling
public_o11y_enabled accounting_enabled backups_enabled backups_password backups_schedule backups_prune_schedule
backups_retention cleanup_bucket_on_destroy k8s_version node_group_version
""".split()  # noqa: SIM905
QUOTA_GIBIBYTES, SHARED_GIBIBYTES, CONTROLLER_GIBIBYTES = 5120, 2048, 128


def values(text: str) -> dict:
    return {name.strip('"'): value for name, value in hcl2.loads(text).items() if not name.startswith("__")}


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A repository laid out as the recipe's, which knows the variables that we give."""
    example = tmp_path / "theirs" / "soperator" / "installations" / "example"
    example.mkdir(parents=True)
    (example / "variables.tf").write_text("".join(f'variable "{name}" {{}}\n' for name in KNOWN))
    (example / "terraform.tfvars").write_text(
        'company_name = ""\nbackups_password = "password"\nk8s_version = "1.36"\n'
    )
    (example / ".envrc").write_text("# theirs\n")
    git(tmp_path / "theirs", "init", "--quiet")
    git(tmp_path / "theirs", "add", ".")
    git(tmp_path / "theirs", "commit", "--quiet", "-m", "theirs")
    return tmp_path / "theirs"


def prepare(tmp_path: Path, recipe: Path, text: str | None) -> subprocess.CompletedProcess:
    folder = tmp_path / "ours"
    folder.mkdir(exist_ok=True)
    shutil.copy(FOLDER / "prepare.sh", folder)
    if text is not None:
        (folder / "values.auto.tfvars").write_text(text)
    told = {"RECIPE_REPOSITORY": f"file://{recipe}", "RECIPE_COMMIT": git(recipe, "rev-parse", "HEAD")}
    return subprocess.run(["bash", str(folder / "prepare.sh")], capture_output=True, text=True, env=os.environ | told)


def test_the_filesystems_stay_within_the_quota_of_a_new_tenant():
    ours = values(EXAMPLE.read_text())
    (mounted,) = ours["filesystem_jail_submounts"]
    assert "existing" in mounted
    made = sum(ours[name]["spec"]["size_gibibytes"] for name in ("filesystem_jail", "filestore_accounting"))
    assert made + SHARED_GIBIBYTES + CONTROLLER_GIBIBYTES <= QUOTA_GIBIBYTES
    assert f"{made + SHARED_GIBIBYTES + CONTROLLER_GIBIBYTES:,} GiB" in (FOLDER / "README.md").read_text()


def test_it_is_the_reference_cluster():
    (workers,) = values(EXAMPLE.read_text())["slurm_nodeset_workers"]
    assert workers["size"] == 2
    assert workers["resource"]["preset"].strip('"').startswith("8gpu-")
    assert "infiniband_fabric" in workers["gpu_cluster"]


def test_our_values_come_beside_theirs_and_the_known_password_goes(tmp_path, recipe):
    filled = EXAMPLE.read_text().replace("FILL_IN ", "")
    done = prepare(tmp_path, recipe, filled)
    assert done.returncode == 0, done.stderr
    own = tmp_path / "ours" / "recipe" / "soperator" / "installations" / "proving-ground"
    assert (own / "values.auto.tfvars").read_text() == filled
    assert (own / "terraform.tfvars").read_text() == 'company_name = ""\nk8s_version = "1.36"\n'
    assert (own / ".envrc").exists()
    # Again, with other values: nothing of the first time stays.
    (own / "left-over").touch()
    (own / ".terraform.lock.hcl").write_text("versions of then\n")
    assert prepare(tmp_path, recipe, filled.replace("size = 2", "size = 4")).returncode == 0
    assert "size = 4" in (own / "values.auto.tfvars").read_text()
    assert not (own / "left-over").exists()
    assert (own / ".terraform.lock.hcl").read_text() == "versions of then\n"


def test_a_name_that_the_recipe_does_not_know_is_told(tmp_path, recipe):
    done = prepare(
        tmp_path, recipe, EXAMPLE.read_text().replace("FILL_IN ", "").replace("filesystem_jail =", "filestore_jail =")
    )
    assert done.returncode == 1
    assert "has no variable filestore_jail: look for its new name in" in done.stderr


@pytest.mark.parametrize("text", [None, EXAMPLE.read_text()])
def test_nothing_is_fetched_before_the_values_are_there(tmp_path, recipe, text):
    done = prepare(tmp_path, recipe, text)
    assert done.returncode == 1
    assert ("fill it in" if text is None else 'infiniband_fabric = "FILL_IN') in done.stderr
    assert not (tmp_path / "ours" / "recipe").exists()
