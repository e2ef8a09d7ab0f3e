"""CI's workflows: they call what exists, may do the least, and put nothing of a stranger's into a shell."""

import copy
import re

import pytest
import yaml

from infra.docker.image_test import NEEDED
from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / ".github" / "workflows"
WORKFLOWS = {file.name: yaml.safe_load(file.read_text()) for file in sorted(FOLDER.glob("*.yaml"))}
TARGETS = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
WRITES = {"images.yaml/image": {"packages"}, "images.yaml/release": {"contents"}}
"""What a job may write, and why it must: push an image, make a release."""


def problems(name: str, workflow: dict) -> list[str]:
    found = []
    if workflow.get("permissions") != {"contents": "read"}:
        found.append("the workflow may do more than read")
    for title, job in workflow["jobs"].items():
        text = yaml.safe_dump(job)
        needs = job.get("needs", [])
        found += [
            f"{title} needs {n}" for n in ([needs] if isinstance(needs, str) else needs) if n not in workflow["jobs"]
        ]
        matrix = job.get("strategy", {}).get("matrix", {})
        known = {*matrix, *(key for entry in matrix.get("include", []) for key in entry)}
        found += [f"{title} has no matrix.{n}" for n in set(re.findall(r"\bmatrix\.(\w+)", text)) - known]
        ids = {step["id"] for step in job["steps"] if "id" in step}
        found += [f"{title} has no step {n}" for n in set(re.findall(r"\bsteps\.(\w+)\.", text)) - ids]
        writes = {key for key, value in job.get("permissions", {}).items() if value != "read"}
        if extra := writes - WRITES.get(f"{name}/{title}", set()):
            found.append(f"{title} may write {sorted(extra)}")
        if "timeout-minutes" not in job:
            found.append(f"{title} has no time limit")
        if str(job["runs-on"]).endswith("latest"):
            found.append(f"{title} runs on whatever is latest")
        for step in job["steps"]:
            action, command = step.get("uses", ""), step.get("run", "")
            if action and not re.search(r"@[0-9a-f]{40}$", action):
                found.append(f"{action} is not pinned by commit")
            if action.startswith("actions/checkout") and step.get("with", {}).get("persist-credentials") is not False:
                found.append(f"{title} leaves its token in the checkout")
            # matrix values are the file's own.
            found += [f"{title} puts {e} into a shell" for e in re.findall(r"\$\{\{\s*(?!matrix\.)([\w.]+)", command)]
            found += [f"no target {t}" for t in re.findall(r"\bmake ([a-z-]+)(?![\w.])", command) if t not in TARGETS]
            files = re.findall(r"\binfra/[\w./-]+", command)
            found += [f"no file {f}" for f in files if not (REPOSITORY / f).exists()]
    return found


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_names_versions_and_may_do_the_least(name):
    assert problems(name, WORKFLOWS[name]) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.update(permissions="write-all"), "more than read"),
        (lambda w: w["jobs"]["test"].update(permissions={"contents": "write"}), "may write"),
        (lambda w: w["jobs"]["test"]["steps"].append({"uses": "a/b@v4"}), "not pinned by commit"),
        (lambda w: w["jobs"]["test"]["steps"][0].pop("with"), "leaves its token"),
        (lambda w: w["jobs"]["test"]["steps"].append({"run": "echo ${{ github.head_ref }}"}), "into a shell"),
        (lambda w: w["jobs"]["test"]["steps"].append({"run": "make tset"}), "no target tset"),
        (lambda w: w["jobs"]["kind"]["steps"].append({"run": "kubectl apply -k infra/nowhere"}), "no file"),
        (lambda w: w["jobs"]["test"].pop("timeout-minutes"), "no time limit"),
        (lambda w: w["jobs"]["test"].update(needs="chekc"), "needs chekc"),
        (lambda w: w["jobs"]["demo"]["steps"].append({"run": "echo ${{ matrix.python }}"}), "no matrix.python"),
        (lambda w: w["jobs"]["test"].update(env={"X": "${{ steps.tags.outputs.x }}"}), "no step tags"),
    ],
)
def test_each_rule_can_be_broken(change, said):
    workflow = copy.deepcopy(WORKFLOWS["ci.yaml"])
    change(workflow)
    assert any(said in problem for problem in problems("ci.yaml", workflow))


def test_an_action_is_one_commit_everywhere_and_says_which_version_that_is():
    pins = {
        (action, commit, version)
        for file in FOLDER.glob("*.yaml")
        for action, commit, version in re.findall(r"uses: ([^@\s]+)@(\S+)(.*)", file.read_text())
    }
    assert len({action for action, _, _ in pins}) == len(pins) > 5
    assert [pin for pin in pins if not re.fullmatch(r" # v\d+\.\d+\.\d+", pin[2])] == []


def test_every_python_that_is_promised_is_tested_and_every_suite_runs():
    jobs = WORKFLOWS["ci.yaml"]["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    commands = " ".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    for target in ("check", "test", "demo", "test-slurm", "test-kubernetes", "stack-test"):
        assert f"make {target}" in commands
    weekly = WORKFLOWS["scan.yaml"]
    assert weekly[True]["schedule"]
    assert weekly["jobs"]["mutations"]["steps"][-1]["run"] == "make mutations"


def test_what_reads_pull_requests_may_read_them_in_a_private_repository_too():
    job = WORKFLOWS["scan.yaml"]["jobs"]["secrets"]
    assert any("gitleaks-action" in step.get("uses", "") for step in job["steps"])
    assert job["permissions"] == {"contents": "read", "pull-requests": "read"}


def test_dependabot_moves_every_kind_of_version_that_is_written_down():
    updates = yaml.safe_load((REPOSITORY / ".github" / "dependabot.yml").read_text())["updates"]
    watched = {entry["package-ecosystem"]: entry["directory"] for entry in updates}
    assert watched == {"github-actions": "/", "docker": "/infra/docker", "docker-compose": "/infra/docker", "pip": "/"}


def test_a_bare_debian_gets_what_the_local_cluster_calls():
    # The image debian:bookworm has neither pkill nor ps.
    script = (REPOSITORY / "infra" / "slurm" / "local-cluster.sh").read_text()
    [commands, packages] = re.findall(r"local commands=\(([^)]*)\) packages=\(([^)]*)\)", script)[0]
    assert {"pkill", "ps"} <= set(commands.split())
    assert "procps" in packages.split()
    [install] = [
        step["run"] for step in WORKFLOWS["ci.yaml"]["jobs"]["slurm"]["steps"] if "apt-get" in step.get("run", "")
    ]
    assert "procps" in install.split()


def test_build_files_of_the_images_exist_and_each_is_tested_before_it_is_pushed():
    job = WORKFLOWS["images.yaml"]["jobs"]["image"]
    for entry in job["strategy"]["matrix"]["include"]:
        text = (REPOSITORY / "infra" / "docker" / entry["file"]).read_text()
        assert not entry["target"] or f"AS {entry['target']}" in text
        # The test is told which image it is in.
        assert entry["kind"] in NEEDED
        # The very base that the file names to those who want CUDA's own libraries.
        assert not entry["base"] or f"--build-arg BASE={entry['base']} " in text
    kinds = {(entry["kind"], "cuda" in entry["base"]) for entry in job["strategy"]["matrix"]["include"]}
    assert kinds == {(kind, False) for kind in NEEDED} | {("train", True)}
    steps = job["steps"]
    built = [step["with"] for step in steps if "build-args" in step.get("with", {})]
    assert len(built) == 2
    assert all("matrix.base && format('BASE={0}', matrix.base)" in each["build-args"] for each in built)
    tested = next(i for i, step in enumerate(steps) if "image_test.py" in step.get("run", ""))
    assert "if" not in steps[tested]
    pushed = next(i for i, step in enumerate(steps) if step.get("with", {}).get("push"))
    assert tested < pushed
    assert all(step.get("if") == "github.event_name == 'push'" for step in steps if step.get("with", {}).get("push"))
    assert (steps[pushed]["with"]["sbom"], steps[pushed]["with"]["provenance"]) == (True, "mode=max")


def test_tags_are_latest_sha_and_versions():
    tags = next(s for s in WORKFLOWS["images.yaml"]["jobs"]["image"]["steps"] if s.get("id") == "tags")["with"]["tags"]
    assert all(kind in tags for kind in ("value=latest", "prefix=sha-", "pattern=v"))
    # YAML 1.1 reads the key `on` as true.
    assert WORKFLOWS["images.yaml"][True]["push"]["tags"] == ["v*"]
