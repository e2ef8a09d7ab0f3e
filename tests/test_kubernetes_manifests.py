"""Every object of infra/kubernetes: known to Kubernetes field by field, admitted by Pod Security, bound to what exists.

Overlays are compared whole with golden files where kubectl is at hand. Each check is shown to fail on an object broken for it.
"""

import copy
import shutil
import subprocess
from collections.abc import Iterator

import kubernetes_validate
import pytest
import yaml

from deployments.work_pools import CLAIM, FLOW_ACCOUNT, MLFLOW, NAMESPACE, SECRETS
from tasks.pool.kubernetes_objects import TOKEN
from tests.conftest import REPOSITORY
from tests.pool.test_kubernetes_objects import NEWEST, OLDEST

FOLDER = REPOSITORY / "infra" / "kubernetes"
GOLDEN = REPOSITORY / "tests" / "golden"
OVERLAYS = ["generic", "nebius", "kind"]
SERVERS = "proving-ground-servers"


def written() -> dict[tuple[str, str, str], dict]:
    """Every object in our files, by kind, namespace and name; kustomize's own files apart."""
    files = [file for file in sorted(FOLDER.rglob("*.yaml")) if file.name not in ("kustomization.yaml", "site.yaml")]
    objects = [entry for file in files for entry in yaml.safe_load_all(file.read_text())]
    # training-pool leaves its namespace to its kustomization.
    named = {(o["kind"], o["metadata"].get("namespace", NAMESPACE), o["metadata"]["name"]): o for o in objects}
    assert len(named) == len(objects), "two objects of one name"
    return named


OBJECTS = written()
PLAIN = {key: o for key, o in OBJECTS.items() if "kueue" not in o["apiVersion"]}


def name_of(key: tuple[str, str, str]) -> str:
    return "/".join(key)


def pod_of(o: dict) -> dict | None:
    """The pod that an object makes, if it makes one."""
    if o["kind"] == "CronJob":
        return o["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    if o["kind"] in ("Deployment", "StatefulSet", "Job", "DaemonSet"):
        return o["spec"]["template"]["spec"]
    return None


def pods() -> dict[str, dict]:
    return {name_of(key): pod for key, o in OBJECTS.items() if (pod := pod_of(o)) is not None}


def test_postgres_is_ready_only_once_its_databases_are_made():
    # The image's first start serves the socket alone while databases.sh runs.
    [container] = pods()[f"StatefulSet/{SERVERS}/postgres"]["containers"]
    command = container["readinessProbe"]["exec"]["command"]
    assert command[command.index("-h") + 1] == "127.0.0.1"


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("key", PLAIN, ids=name_of)
def test_every_field_is_known_to_the_oldest_and_the_newest_kubernetes(key, version):
    kubernetes_validate.validate(PLAIN[key], version, strict=True)


@pytest.mark.parametrize("key", PLAIN, ids=name_of)
def test_the_validation_sees_a_misspelt_field_in_each_of_them(key):
    broken = copy.deepcopy(PLAIN[key])
    broken["spce" if "spec" in broken else "metdata"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, NEWEST, strict=True)


def violations(pod: dict) -> Iterator[str]:
    """Of Pod Security `restricted`, and of what we ask beyond it."""
    if any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
        yield "shares the host's namespaces"
    security = pod.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or security.get("runAsUser", 0) == 0:
        yield "may be root"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "has no seccomp profile"
    if any(volume.keys() & {"hostPath"} for volume in pod.get("volumes", [])):
        yield "mounts a folder of the node"
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities") != {"drop": ["ALL"]}:
            yield "may gain rights"
        if own.get("readOnlyRootFilesystem") is not True:
            yield "may write its root"
        if "memory" not in container.get("resources", {}).get("limits", {}):
            yield "has no memory limit"
        if any(
            "password" in str(entry.get("value", "")).lower() and "/run/secrets" not in entry["value"]
            for entry in container.get("env", [])
        ):
            yield "has a password in its environment"


@pytest.mark.parametrize("name", pods())
def test_pods_pass_pod_security_restricted_and_have_limits(name):
    assert list(violations(pods()[name])) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda pod: pod["securityContext"].update(runAsUser=0), "may be root"),
        (lambda pod: pod["securityContext"].pop("seccompProfile"), "has no seccomp profile"),
        (lambda pod: pod.update(hostNetwork=True), "shares the host's namespaces"),
        (lambda pod: pod["volumes"].append({"name": "x", "hostPath": {"path": "/"}}), "mounts a folder of the node"),
        (lambda pod: pod["containers"][0]["securityContext"].pop("capabilities"), "may gain rights"),
        (
            lambda pod: pod["containers"][0]["securityContext"].update(readOnlyRootFilesystem=False),
            "may write its root",
        ),
        (lambda pod: pod["containers"][0].pop("resources"), "has no memory limit"),
        (
            lambda pod: pod["containers"][0]["env"].append({"name": "X", "value": "password"}),
            "has a password in its environment",
        ),
    ],
)
def test_each_rule_for_pods_can_be_broken(change, said):
    pod = copy.deepcopy(pods()[f"Deployment/{SERVERS}/mlflow"])
    change(pod)
    assert said in list(violations(pod))


def dangling(objects: dict[tuple[str, str, str], dict]) -> Iterator[str]:
    """References to what no file makes: accounts, roles, claims, selectors of Services."""
    made_elsewhere = {
        ("Secret", SERVERS, "servers"),
        ("Secret", NAMESPACE, SECRETS),
        ("ConfigMap", SERVERS, "database-scripts"),
    }
    known = objects.keys() | made_elsewhere
    labels = [
        o["spec"]["template"]["metadata"]["labels"]
        for o in objects.values()
        if o["kind"] in ("Deployment", "StatefulSet")
    ]
    for (kind, namespace, name), o in objects.items():
        where = f"{kind}/{name}"
        if pod := pod_of(o):
            wanted = [("ServiceAccount", namespace, pod["serviceAccountName"])]
            for volume in pod.get("volumes", []):
                if "persistentVolumeClaim" in volume:
                    wanted.append(("PersistentVolumeClaim", namespace, volume["persistentVolumeClaim"]["claimName"]))
                if "secret" in volume:
                    wanted.append(("Secret", namespace, volume["secret"]["secretName"]))
                if "configMap" in volume:
                    wanted.append(("ConfigMap", namespace, volume["configMap"]["name"]))
            volumes = {
                volume["name"]
                for volume in [
                    *pod.get("volumes", []),
                    *({"name": c["metadata"]["name"]} for c in o["spec"].get("volumeClaimTemplates", [])),
                ]
            }
            for container in pod["containers"]:
                yield from (
                    f"{where} mounts {m['name']}, which is no volume"
                    for m in container.get("volumeMounts", [])
                    if m["name"] not in volumes
                )
            yield from (f"{where} needs {'/'.join(w)}" for w in wanted if w not in known)
        if kind in ("RoleBinding", "ClusterRoleBinding"):
            role = (o["roleRef"]["kind"], namespace, o["roleRef"]["name"])
            subjects = [("ServiceAccount", s["namespace"], s["name"]) for s in o["subjects"]]
            yield from (f"{where} binds {'/'.join(w)}" for w in [role, *subjects] if w not in known)
        if kind == "Service" and not any(o["spec"]["selector"].items() <= found.items() for found in labels):
            yield f"{where} selects no pod"


def test_everything_that_is_referred_to_is_there():
    assert list(dangling(OBJECTS)) == []


@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        (("Service", SERVERS, "mlflow"), lambda o: o["spec"].update(selector={"app": "mlfow"}), "selects no pod"),
        (("RoleBinding", NAMESPACE, "proving-ground-worker"), lambda o: o["roleRef"].update(name="other"), "binds"),
        (
            ("ClusterRoleBinding", NAMESPACE, "proving-ground-node-taints"),
            lambda o: o["roleRef"].update(name="x"),
            "binds",
        ),
        (
            ("Deployment", SERVERS, "prefect"),
            lambda o: pod_of(o).update(serviceAccountName="other"),
            "needs ServiceAccount",
        ),
        (("Deployment", SERVERS, "mlflow"), lambda o: pod_of(o)["volumes"].pop(1), "which is no volume"),
    ],
)
def test_a_reference_into_nothing_is_seen(key, change, said):
    objects = copy.deepcopy(OBJECTS)
    change(objects[key])
    assert said in " ".join(dangling(objects))


def test_nobody_may_read_secrets_or_act_outside_the_namespace_of_jobs():
    rules = [(key, rule) for key, o in OBJECTS.items() if o["kind"] in ("Role", "ClusterRole") for rule in o["rules"]]
    # The one right beyond the namespace is a component that nobody has who did not ask for it.
    beyond = [(key, rule) for key, rule in rules if key[0] == "ClusterRole"]
    assert [(key[2], rule) for key, rule in beyond] == [
        ("proving-ground-node-taints", {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "patch"]})
    ]
    rules = [entry for entry in rules if entry not in beyond]
    assert rules
    assert {key[:2] for key, _ in rules} == {("Role", NAMESPACE)}
    allowed = {"jobs", "services", "pods", "pods/log", "events", "workloads"}
    for key, rule in rules:
        assert set(rule["resources"]) <= allowed, key
        assert "*" not in {*rule["verbs"], *rule["apiGroups"]}, key


def test_only_an_overlay_that_asks_for_it_lets_flows_taint_nodes():
    listed = {file: yaml.safe_load(file.read_text()) for file in FOLDER.rglob("kustomization.yaml")}
    assert listed.pop(FOLDER / "node-taints" / "kustomization.yaml")["kind"] == "Component"
    named = [entry for k in listed.values() for entry in [*k.get("resources", []), *k.get("components", [])]]
    assert named
    assert not [entry for entry in named if "node-taints" in entry]


@pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl here; CI has one")
def test_the_component_fits_into_an_overlay(tmp_path):
    shutil.copytree(FOLDER.parent, tmp_path / "infra")
    overlay = tmp_path / "infra" / "kubernetes" / "overlays" / "generic"
    file = overlay / "kustomization.yaml"
    file.write_text(file.read_text() + "components: [../../node-taints]\n")
    told = subprocess.run(["kubectl", "kustomize", str(overlay)], capture_output=True, text=True, check=True).stdout
    added = [o for o in yaml.safe_load_all(told) if o["kind"].startswith("ClusterRole")]
    assert [o["metadata"]["name"] for o in added] == ["proving-ground-node-taints"] * 2


def test_every_namespace_lets_nothing_pass_that_is_not_named():
    for namespace in (NAMESPACE, SERVERS):
        policy = OBJECTS["NetworkPolicy", namespace, "nothing-else"]["spec"]
        assert policy == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
        labels = OBJECTS["Namespace", NAMESPACE, namespace]["metadata"]["labels"]
        assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_ranks_and_flows_are_told_apart_by_the_label_that_jobs_carry():
    keys = {
        expression["key"]
        for o in OBJECTS.values()
        if o["kind"] == "NetworkPolicy" and o["metadata"]["name"] in ("ranks", "flows")
        for expression in o["spec"]["podSelector"]["matchExpressions"]
    }
    assert keys == {TOKEN}
    rendered = yaml.safe_load((GOLDEN / "kubernetes-small.yaml").read_text().split("---")[0])
    assert TOKEN in rendered["spec"]["template"]["metadata"]["labels"]


def test_flow_pods_find_their_claim_account_and_servers():
    assert ("PersistentVolumeClaim", NAMESPACE, CLAIM) in OBJECTS
    assert ("ServiceAccount", NAMESPACE, FLOW_ACCOUNT) in OBJECTS
    host, port = MLFLOW.removeprefix("http://").split(":")
    name, namespace = host.split(".")
    assert OBJECTS["Service", namespace, name]["spec"]["ports"][0]["port"] == int(port)
    allowed = next(
        e["value"]
        for e in pods()[f"Deployment/{SERVERS}/mlflow"]["containers"][0]["env"]
        if e["name"].endswith("ALLOWED_HOSTS")
    )
    assert f"{host}:{port}" in allowed.split(",")


def kustomized(overlay: str) -> str:
    return subprocess.run(
        ["kubectl", "kustomize", str(FOLDER / "overlays" / overlay)], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl here; CI has one")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_whole_overlay(overlay):
    """`UPDATE_GOLDEN=1` is no option: read the difference, then copy `kubectl kustomize` over the file."""
    assert kustomized(overlay) == (GOLDEN / f"kustomize-{overlay}.yaml").read_text()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_an_overlay_makes_is_valid_as_well(overlay):
    objects = list(yaml.safe_load_all((GOLDEN / f"kustomize-{overlay}.yaml").read_text()))
    assert len(objects) > 30
    for o in objects:
        if "kueue" not in o["apiVersion"]:
            kubernetes_validate.validate(o, NEWEST, strict=True)
        if pod := pod_of(o):
            assert list(violations(pod)) == []


def test_the_queue_covers_every_resource_that_the_example_site_asks_for():
    queue = OBJECTS["ClusterQueue", NAMESPACE, "proving-ground"]["spec"]["resourceGroups"][0]["coveredResources"]
    rendered = yaml.safe_load((GOLDEN / "kubernetes-full.yaml").read_text().split("---")[0])
    asked = rendered["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"]
    assert asked.keys() <= set(queue)
