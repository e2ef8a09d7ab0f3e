"""infra/databases: what is made is what is backed up and restored, and the cluster gets every script."""

import re

import yaml

from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "infra" / "databases"


def test_every_database_that_is_made_is_backed_up_and_restored():
    made = set(re.findall(r"^create database (\w+)", (FOLDER / "databases.sh").read_text(), re.M))
    assert made == {"prefect", "mlflow", "mlflow_auth"}
    for script in ("backup.sh", "restore.sh"):
        for listed in re.findall(r"^for database in (.*); do", (FOLDER / script).read_text(), re.M):
            assert set(listed.split()) == made, script


def test_the_cluster_gets_every_script():
    [scripts] = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["configMapGenerator"]
    assert set(scripts["files"]) == {file.name for file in FOLDER.glob("*.sh")}
