"""compose.yaml and the images' files: what can be known of them without containers."""

import configparser
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from infra.docker.image_test import NEEDED, size_mb
from infra.docker.make_secrets import HUB_TOKEN, NAMES, PREFECT_AUTH, make_secrets
from infra.docker.with_secrets import with_secrets
from tests.conftest import REPOSITORY
from tests.settings_names import unknown_settings
from tests.stack.compose import FILE, filled, read_compose, variables

COMPOSE = yaml.safe_load(FILE.read_text())
DOCKER = FILE.parent


def test_every_secret_of_a_service_is_one_that_is_made():
    made = {*NAMES, PREFECT_AUTH, HUB_TOKEN}
    assert set(COMPOSE["secrets"]) == made
    for name, service in COMPOSE["services"].items():
        asked = {Path(v).name for k, v in service.get("environment", {}).items() if k.endswith(("_FROM_FILE", "_FILE"))}
        granted = set(service.get("secrets", []))
        assert asked <= granted <= made, name


def test_no_value_in_the_file_is_a_secret_itself():
    for name, service in COMPOSE["services"].items():
        for key, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|AUTH_STRING|SECRET|KEY", key):
                assert key.endswith("_FILE"), (name, key, value)
        assert not any("://" in word and "@" in word for word in service["command"])


def test_ours_run_without_rights_and_only_localhost_sees_their_ports():
    for name, service in COMPOSE["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        if name != "postgres":
            assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"]), name
        image = service["image"]
        assert "proving-ground" in image or re.search(r":\d+\.\d+-", image), f"{name}: {image} is not pinned"


def test_what_waits_for_another_waits_for_its_health():
    for name, service in COMPOSE["services"].items():
        for other, how in service.get("depends_on", {}).items():
            needed = "service_completed_successfully" if other == "deploy" else "service_healthy"
            assert how["condition"] == needed, (name, other)
            assert other == "deploy" or "healthcheck" in COMPOSE["services"][other]


def test_every_setting_is_one_that_its_program_knows():
    for name, service in COMPOSE["services"].items():
        assert unknown_settings(service.get("environment", {})) == [], name
    assert unknown_settings(["PREFECT_API_URL", "PREFECT_API_ADDRESS", "MLFLOW_ALLOWED_HOSTS_FROM_FILE", "PGHOST"]) == [
        "MLFLOW_ALLOWED_HOSTS",
        "PREFECT_API_ADDRESS",
    ]


def test_each_server_is_asked_for_its_own_health():
    healthy = {"prefect": "PREFECT_PORT:-4200}/api/health", "mlflow": "MLFLOW_PORT:-5000}/health"}
    for name, end in healthy.items():
        assert f"localhost:${{{end}'" in COMPOSE["services"][name]["healthcheck"]["test"][-1]


def test_variables_have_defaults_and_the_stack_test_may_set_each():
    assert variables(COMPOSE) >= {"SECRETS", "PREFECT_PORT", "MLFLOW_PORT", "POSTGRES_HOST"}
    services = read_compose({})
    assert services["prefect"].environment["PREFECT_SERVER_DATABASE_HOST"] == "postgres"
    assert services["worker"].environment["PREFECT_API_URL"] == "http://prefect:4200/api"
    with pytest.raises(ValueError, match="NOWHERE"):
        filled("${NOWHERE}", {})


def test_bind_mounts_and_build_files_exist():
    for name, service in COMPOSE["services"].items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (DOCKER / source).exists(), (name, volume)
        if build := service.get("build"):
            assert (DOCKER / build["context"] / build["dockerfile"]).exists()


@pytest.mark.parametrize("name", ["Dockerfile.flows", "Dockerfile.train"])
def test_images_are_pinned_run_as_a_user_and_copy_what_exists(name):
    text = (DOCKER / name).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    final = max(i for i, line in enumerate(lines) if line.startswith("USER"))
    assert lines[final] == "USER 1000:1000"
    assert not any(line.startswith("RUN") for line in lines[final:])
    for base in re.findall(r"^ARG (?:BASE|PYTHON)=(\S+)", text, re.M):
        assert re.search(r":\d+\.\d+\.\d+", base), f"{base} is not pinned"
    assert any(line.startswith("HEALTHCHECK") for line in lines)
    # Without it nothing becomes of NAME_FROM_FILE; what it starts lies where COPY put it.
    assert 'ENTRYPOINT ["python", "/app/infra/docker/with_secrets.py"]' in lines
    assert any(line.startswith("COPY") and "infra/docker/with_secrets.py" in line for line in lines)
    assert "WORKDIR /app" in lines
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (REPOSITORY / source).exists(), source
                assert any(kept.startswith("!") and source.startswith(kept[1:]) for kept in ignored), (
                    f"{source} is not sent"
                )
    installs = re.findall(r"pip install [^&|]*", text)
    assert installs
    assert all("-c constraints.txt" in install for install in installs)


def test_the_worker_loads_what_it_compiles_and_says_whether_it_polls():
    worker = COMPOSE["services"]["worker"]
    # Without exec no kernel that Inductor or Triton built under /tmp can be loaded.
    [temporary] = worker["tmpfs"]
    assert "exec" in temporary.removeprefix("/tmp:").split(",")
    assert "--with-healthcheck" in worker["command"]
    port = worker["environment"]["PREFECT_WORKER_WEBSERVER_PORT"]
    assert f"localhost:{port}/health" in worker["healthcheck"]["test"][-1]
    text = (DOCKER / "Dockerfile.train").read_text()
    assert "HEALTHCHECK NONE" in text
    assert "python3-dev" in text


def test_the_hubs_library_takes_the_token_from_the_workers_file_and_an_empty_one_for_none(tmp_path):
    make_secrets(tmp_path)
    path = Path(read_compose({"SECRETS": str(tmp_path)})["worker"].environment["HF_TOKEN_PATH"])
    code = "import huggingface_hub; print(huggingface_hub.get_token())"
    for content in ("", "hf_planted"):
        path.chmod(0o600)
        path.write_text(content)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_TOKEN")}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment | {"HF_TOKEN_PATH": str(path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == (content or "None")


def copied_by(dockerfile: str) -> set[str]:
    """Files and folders of ours that an image has."""
    lines = (DOCKER / dockerfile).read_text().splitlines()
    copies = [line.split()[1:-1] for line in lines if line.startswith("COPY") and "--from" not in line]
    return {source for sources in copies for source in sources}


def test_files_that_a_service_is_told_to_read_are_in_its_image():
    built = {
        service["image"]: service["build"]["dockerfile"]
        for service in COMPOSE["services"].values()
        if "build" in service
    }
    found = set()
    for name, service in read_compose({}).items():
        if COMPOSE["services"][name]["image"] not in built:
            continue
        dockerfile = Path(built[COMPOSE["services"][name]["image"]]).name
        words = " ".join([*service.command, *service.environment.values()])
        for path in re.findall(r"\binfra/[\w./-]+", words):
            found.add(path)
            assert path in copied_by(dockerfile), f"{name} reads {path}, which {dockerfile} does not copy"
    assert "infra/docker/site.yaml" in found


def test_the_flows_image_has_no_torch():
    text = (DOCKER / "Dockerfile.flows").read_text()
    assert "train" not in re.findall(r"'\.\[([^\]]*)\]'", text)[0]


def test_the_size_of_an_image_is_that_of_its_files_without_the_kernels_and_a_file_of_two_names_counts_once(tmp_path):
    for name, size in {"usr/lib/a": 2_000_000, "etc/b": 500_000, "proc/kcore": 9_000_000, "top": 250_000}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "usr" / "again").hardlink_to(tmp_path / "usr" / "lib" / "a")
    (tmp_path / "lib").symlink_to("usr/lib")
    assert size_mb(tmp_path) == pytest.approx(2.75, abs=1e-3)


def test_what_the_servers_image_is_asked_for_is_installed_where_it_is_built_from():
    asked = f"import {', '.join(NEEDED['servers'])}"
    done = subprocess.run([sys.executable, "-c", asked], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_both_servers_ask_who_is_there_and_a_stranger_may_see_nothing():
    prefect, mlflow = (read_compose({})[name] for name in ("prefect", "mlflow"))
    # The second is the server's own client's.
    for name in ("PREFECT_SERVER_API_AUTH_STRING_FROM_FILE", "PREFECT_API_AUTH_STRING_FROM_FILE"):
        assert prefect.environment[name] == f"/run/secrets/{PREFECT_AUTH}"
    assert mlflow.command[mlflow.command.index("--app-name") + 1] == "basic-auth"
    assert mlflow.environment["MLFLOW_AUTH_ADMIN_PASSWORD_FROM_FILE"] == "/run/secrets/mlflow_admin_password"
    assert mlflow.environment["MLFLOW_AUTH_CONFIG_PATH"].endswith("infra/docker/mlflow-auth.ini")
    rights = configparser.ConfigParser()
    rights.read(DOCKER / "mlflow-auth.ini")
    assert rights["mlflow"]["default_permission"] == "NO_PERMISSIONS"
    assert rights["mlflow"]["grant_default_workspace_access"] == "false"


def test_what_must_outlive_a_container_lies_on_a_volume():
    mounted = {name: dict(v.split(":")[:2] for v in s.get("volumes", [])) for name, s in COMPOSE["services"].items()}
    assert mounted["postgres"]["postgres"] == "/var/lib/postgresql/data"
    assert mounted["postgres"]["backups"] == "/backups"
    assert mounted["mlflow"]["artifacts"] == read_compose({})["mlflow"].environment["MLFLOW_ARTIFACTS_DESTINATION"]
    assert mounted["worker"]["storage"] == "/app/storage"


def test_the_flows_image_does_without_scipy_which_its_build_takes_away():
    assert " scipy " in (DOCKER / "Dockerfile.flows").read_text().partition("AS client-packages")[2]
    asked = f"import sys; sys.modules['scipy'] = None; import {', '.join(NEEDED['flows'])}"
    done = subprocess.run([sys.executable, "-c", asked], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_secrets_are_made_once_behind_a_folder_that_only_their_owner_opens(tmp_path):
    folder = tmp_path / "secrets"
    assert set(make_secrets(folder)) == {*NAMES, PREFECT_AUTH, HUB_TOKEN}
    before = {file.name: file.read_text() for file in folder.iterdir()}
    assert make_secrets(folder) == []
    assert {file.name: file.read_text() for file in folder.iterdir()} == before
    assert len(set(before.values())) == len(before)
    for file in folder.iterdir():
        # Compose mounts a file with its owner and mode, and each container runs as another user.
        assert stat.S_IMODE(file.stat().st_mode) == 0o444
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_secret_reaches_the_command_by_its_environment_and_never_its_arguments(tmp_path):
    (tmp_path / "token").write_text("planted-token\n")
    code = "import os; print(os.environ['TOKEN'], 'TOKEN_FROM_FILE' in os.environ, open('/proc/self/cmdline').read())"
    done = subprocess.run(
        [sys.executable, DOCKER / "with_secrets.py", sys.executable, "-c", code],
        env=os.environ | {"TOKEN_FROM_FILE": str(tmp_path / "token")},
        capture_output=True,
        text=True,
        check=True,
    )
    told, is_left, arguments = done.stdout.split(maxsplit=2)
    assert (told, is_left) == ("planted-token", "False")
    assert "planted-token" not in arguments


@pytest.mark.parametrize(("content", "said"), [(None, "No such file"), ("\n", "is empty")])
def test_a_missing_or_empty_secret_ends_the_start(tmp_path, content, said):
    if content is not None:
        (tmp_path / "token").write_text(content)
    with pytest.raises(SystemExit, match=said):
        with_secrets({"TOKEN_FROM_FILE": str(tmp_path / "token")})
