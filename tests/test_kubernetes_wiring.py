"""What Kubernetes takes without a word and nothing then works: names of ports, labels, secrets, settings, images and patches."""

import os
import re
import subprocess
from collections.abc import Iterator

import pytest
import yaml

from infra.docker.make_secrets import NAMES, PREFECT_AUTH
from tests.settings_names import unknown_settings
from tests.test_kubernetes_manifests import FOLDER, OBJECTS, OVERLAYS, SERVERS, name_of, pod_of

OURS = {"proving-ground-flows", "proving-ground-servers"}
KEYS = {("servers", key) for key in (*NAMES, PREFECT_AUTH)} | {
    ("proving-ground-flow", key)
    for key in ("PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
}
"""Of every Secret, as make_secrets.sh makes them."""
WITH_PODS = [(key, o) for key, o in OBJECTS.items() if pod_of(o) is not None]


def template_of(o: dict) -> dict:
    spec = o["spec"]["jobTemplate"]["spec"] if o["kind"] == "CronJob" else o["spec"]
    return spec["template"]


def labels_in(namespace: str) -> list[dict]:
    return [template_of(o)["metadata"]["labels"] for key, o in WITH_PODS if key[1] == namespace]


def ports_in(pod: dict) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for c in pod["containers"] for port in c.get("ports", [])}


def probed(container: dict) -> Iterator[str | int]:
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        for how in ("httpGet", "tcpSocket"):
            if how in container.get(name, {}):
                yield container[name][how]["port"]


@pytest.mark.parametrize(("key", "o"), WITH_PODS, ids=[name_of(key) for key, _ in WITH_PODS])
def test_a_pod_finds_its_ports_secrets_scripts_settings_and_image(key, o):
    pod, template = pod_of(o), template_of(o)
    if "selector" in o["spec"]:
        assert o["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for container in pod["containers"]:
        assert set(probed(container)) <= ports_in(pod).keys()
        assert container["image"] in OURS or re.search(r":\d+\.\d+-", container["image"])
        words = [
            *container.get("command", []),
            *container.get("args", []),
            *(e.get("value", "") for e in container["env"]),
        ]
        mounted = {
            f"{mount['mountPath']}/{item['path']}"
            for mount in container["volumeMounts"]
            for item in volumes.get(mount["name"], {}).get("secret", {}).get("items", [])
        }
        # Of PostgreSQL's scripts, which its image runs by itself.
        asked = set(re.findall(r"/run/secrets/\w+", " ".join(words)))
        assert asked <= mounted
        scripts = {file.name for file in (FOLDER.parent / "databases").glob("*.sh")}
        assert set(re.findall(r"/scripts/([\w.-]+)", " ".join(words))) <= scripts
        keys = [e["valueFrom"]["secretKeyRef"] for e in container["env"] if "valueFrom" in e]
        assert {(k["name"], k["key"]) for k in keys} <= KEYS
        assert unknown_settings(e["name"] for e in container["env"]) == []
    items = [
        (v["secret"]["secretName"], item["key"])
        for v in volumes.values()
        for item in v.get("secret", {}).get("items", [])
    ]
    assert set(items) <= KEYS


def test_both_servers_ask_who_is_there():
    prefect, mlflow = (pod_of(OBJECTS["Deployment", SERVERS, name])["containers"][0] for name in ("prefect", "mlflow"))
    told = {e["name"]: e.get("value") for e in prefect["env"]}
    assert told["PREFECT_SERVER_API_AUTH_STRING_FROM_FILE"] == f"/run/secrets/{PREFECT_AUTH}"
    assert mlflow["args"][mlflow["args"].index("--app-name") + 1] == "basic-auth"
    told = {e["name"]: e.get("value") for e in mlflow["env"]}
    assert told["MLFLOW_AUTH_ADMIN_PASSWORD_FROM_FILE"] == "/run/secrets/mlflow_admin_password"
    assert told["MLFLOW_AUTH_CONFIG_PATH"].endswith("infra/docker/mlflow-auth.ini")


def test_what_changes_the_databases_for_good_never_runs_by_itself():
    jobs = {key[2]: o["spec"] for key, o in OBJECTS.items() if key[0] == "CronJob"}
    assert {name for name, spec in jobs.items() if spec.get("suspend")} == {"mlflow-upgrade", "restore"}
    assert all(spec["jobTemplate"]["spec"]["backoffLimit"] == 0 for spec in jobs.values() if spec.get("suspend")), (
        "a second try would meet what the first one left"
    )
    # Minute, hour, and every day: a schedule that Kubernetes refuses is found only when it is applied.
    minute, hour, *rest = jobs["backup"]["schedule"].split()
    assert int(minute) < 60
    assert int(hour) < 24
    assert rest == ["*", "*", "*"]
    assert jobs["backup"]["timeZone"] == "Etc/UTC"


def test_the_restore_takes_the_newest_night_unless_another_is_named(tmp_path):
    [container] = pod_of(OBJECTS["CronJob", SERVERS, "restore"])["containers"]
    (tmp_path / "postgres_password").write_text("planted")
    (tmp_path / "restore.sh").write_text('#!/bin/sh\necho "asked for $1 with $PGPASSWORD"\n')
    (tmp_path / "restore.sh").chmod(0o755)
    for day in ("2026-11-02", "2026-11-10", "2026-10-30", "2026-11-11.part"):
        (tmp_path / "backups" / day).mkdir(parents=True)
    script = container["args"][0]
    for path, own in (("/run/secrets", ""), ("/scripts", ""), ("/backups", "/backups")):
        script = script.replace(path, f"{tmp_path}{own}")
    for named, expected in (("", f"{tmp_path}/backups/2026-11-10"), ("/backups/2026-10-30", "/backups/2026-10-30")):
        done = subprocess.run(
            [*container["command"], script], env=os.environ | {"RESTORE_FROM": named}, capture_output=True, text=True
        )
        assert f"asked for {expected} with planted" in done.stdout, done.stderr


def test_the_databases_first_start_finds_the_passwords_that_its_script_reads():
    pod = pod_of(OBJECTS["StatefulSet", SERVERS, "postgres"])
    mounted = {item["path"] for v in pod["volumes"] for item in v.get("secret", {}).get("items", [])}
    assert {"prefect_database_password", "mlflow_database_password"} <= mounted


def test_the_secrets_are_made_with_every_key_that_is_asked_for():
    script = (FOLDER / "make_secrets.sh").read_text().replace("\\\n", " ")
    made = set()
    for line in script.splitlines():
        if match := re.match(r"kubectl create secret generic (\S+)", line):
            for file in re.findall(r"--from-file=(\S+)", line):
                key, _, path = file.rpartition("=")
                made.add((match[1], key or path.strip('"').rpartition("/")[2]))
    assert made == KEYS


def test_a_service_leads_to_a_port_of_its_pods():
    services = [(key, o) for key, o in OBJECTS.items() if key[0] == "Service"]
    assert services
    for (_, namespace, name), o in services:
        [pod] = [
            pod_of(other)
            for key, other in WITH_PODS
            if key[1] == namespace and o["spec"]["selector"].items() <= template_of(other)["metadata"]["labels"].items()
        ]
        for port in o["spec"]["ports"]:
            assert ports_in(pod)[port["targetPort"]] == port["port"], name


def test_addresses_are_those_of_services():
    services = {
        (key[2], key[1]): {p["port"] for p in o["spec"]["ports"]} for key, o in OBJECTS.items() if key[0] == "Service"
    }
    found = set()
    for (_, own, _), o in WITH_PODS:
        for container in pod_of(o)["containers"]:
            for entry in container["env"]:
                for name, namespace, port in re.findall(r"http://([\w-]+)\.([\w-]+):(\d+)", entry.get("value", "")):
                    assert int(port) in services[name, namespace]
                    found.add(name)
                if entry["name"] in ("PGHOST", "PREFECT_SERVER_DATABASE_HOST"):
                    assert (entry["value"], own) in services
    assert found == {"prefect"}


def matches(selector: dict, labels: dict) -> bool:
    def holds(e: dict) -> bool:
        has = {"In": labels.get(e["key"]) in e.get("values", []), "Exists": e["key"] in labels}
        return has[e["operator"]] if e["operator"] in has else e["key"] not in labels

    wanted = selector.get("matchLabels", {})
    return all(map(holds, selector.get("matchExpressions", []))) and wanted.items() <= labels.items()


def test_a_network_policy_speaks_of_pods_and_ports_that_there_are():
    policies = [(key, o) for key, o in OBJECTS.items() if key[0] == "NetworkPolicy"]
    namespaces = {key[2] for key in OBJECTS if key[0] == "Namespace"}
    listening = {port for _, o in WITH_PODS for port in ports_in(pod_of(o)).values()} | {53, 443, 6443}
    known = {label for namespace in namespaces for labels in labels_in(namespace) for label in labels.values()}
    for (_, namespace, name), o in policies:
        assert namespace in namespaces
        selector = o["spec"]["podSelector"]
        # Pods of jobs are made by flows and carry the attempt's label; of all others there is one here.
        if not any(e["operator"] == "Exists" for e in selector.get("matchExpressions", [])):
            assert any(matches(selector, labels) for labels in labels_in(namespace)), name
        rules = [*o["spec"].get("ingress", []), *o["spec"].get("egress", [])]
        peers = [peer for rule in rules for peer in (*rule.get("from", []), *rule.get("to", []))]
        for part in [selector, *(peer.get("podSelector", {}) for peer in peers)]:
            named = {v for e in part.get("matchExpressions", []) for v in e.get("values", [])}
            assert named | set(part.get("matchLabels", {}).values()) <= known, name
        for peer in peers:
            wanted = (
                peer.get("namespaceSelector", {})
                .get("matchLabels", {})
                .get("kubernetes.io/metadata.name", "kube-system")
            )
            assert wanted in {*namespaces, "kube-system"}, name
        assert {port["port"] for rule in rules for port in rule.get("ports", [])} <= listening, name


def test_whoever_asks_the_database_may():
    asking = {
        template_of(o)["metadata"]["labels"]["app"]
        for key, o in WITH_PODS
        for container in pod_of(o)["containers"]
        if any(entry["name"] in ("PGHOST", "PREFECT_SERVER_DATABASE_HOST") for entry in container["env"])
    }
    let_in = OBJECTS["NetworkPolicy", SERVERS, "postgres"]["spec"]["ingress"][0]["from"][0]["podSelector"]
    let_out = OBJECTS["NetworkPolicy", SERVERS, "to-postgres"]["spec"]["podSelector"]
    assert set(let_in["matchExpressions"][0]["values"]) == set(let_out["matchExpressions"][0]["values"]) == asking
    assert OBJECTS["NetworkPolicy", SERVERS, "postgres"]["spec"]["podSelector"] == {"matchLabels": {"app": "postgres"}}


def test_the_worker_may_do_what_it_does_and_no_more():
    # prefect-kubernetes makes a Job, watches it and its pods, reads their logs and events, deletes it when its run is cancelled.
    [role] = [o for key, o in OBJECTS.items() if key[0] == "Role" and key[2] == "proving-ground-worker"]
    assert {r: set(rule["verbs"]) for rule in role["rules"] for r in rule["resources"]} == {
        "jobs": {"create", "get", "list", "watch", "delete"},
        "pods": {"get", "list", "watch"},
        "pods/log": {"get"},
        "events": {"list", "watch"},
    }


def test_every_file_is_applied():
    for folder in ("base", "training-pool", "kueue"):
        listed = yaml.safe_load((FOLDER / folder / "kustomization.yaml").read_text())["resources"]
        files = {file.name for file in (FOLDER / folder).glob("*.yaml")} - {"kustomization.yaml"}
        assert {name for name in listed if not name.startswith("..")} == files


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_changes_what_there_is(overlay):
    # A patch whose target is not there, and an image that nobody has, are left out without a word.
    settings = yaml.safe_load((FOLDER / "overlays" / overlay / "kustomization.yaml").read_text())
    assert {image["name"] for image in settings["images"]} == OURS
    for patch in settings["patches"]:
        target = patch["target"]
        hit = [key for key in OBJECTS if re.fullmatch(target["kind"], key[0]) and target.get("name", key[2]) == key[2]]
        assert hit, target


def test_the_queue_of_jobs_leads_to_the_quota_and_its_nodes():
    by_kind = {
        kind: [o for key, o in OBJECTS.items() if key[0] == kind]
        for kind in ("LocalQueue", "ClusterQueue", "ResourceFlavor")
    }
    [local], [cluster], [flavor] = by_kind.values()
    assert local["spec"]["clusterQueue"] == cluster["metadata"]["name"]
    [group] = cluster["spec"]["resourceGroups"]
    assert [f["name"] for f in group["flavors"]] == [flavor["metadata"]["name"]]
    assert [r["name"] for r in group["flavors"][0]["resources"]] == group["coveredResources"]
    allowed = cluster["spec"]["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    assert allowed == local["metadata"]["namespace"]


def test_tables_are_brought_up_by_the_command_that_the_server_asks_for():
    from deployments.database import mlflows

    def environment(kind: str, name: str) -> dict[str, str]:
        [container] = pod_of(OBJECTS[kind, SERVERS, name])["containers"]
        return {e["name"]: e["value"] for e in container["env"]}

    upgrade = OBJECTS["CronJob", SERVERS, "mlflow-upgrade"]
    assert upgrade["spec"]["suspend"] is True
    [container] = pod_of(upgrade)["containers"]
    server = environment("Deployment", "mlflow")
    assert " ".join(container["args"]) == mlflows(server).upgrade
    assert environment("CronJob", "mlflow-upgrade").items() <= server.items()
