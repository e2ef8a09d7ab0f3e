"""A Kubernetes API on this machine: kmock's emulator, over real HTTP, with faults on request."""

import asyncio
import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import aiohttp.web
import kmock
import yaml

JOBS, PODS, SERVICES, EVENTS = "batch/v1/jobs", "v1/pods", "v1/services", "v1/events"
WORKLOADS = "kueue.x-k8s.io/v1beta2/workloads"
Answer = Callable[[Any, Callable[[], Any]], Any]


class Cluster(kmock.KubernetesEmulator):
    """What kmock leaves out and the pool needs: uids, selectors, preconditions, and answers that go wrong.

    Attributes:
        faults: ``(method, part of the path, answer)``, each used once, for the first request that fits.
        seen: ``(method, path with query)`` of every request.
        namespaces: those there are.
        nodes: those that were added, by name.
        behind: how far its clock is behind this machine's.
    """

    namespace = "team"

    def prepare(self) -> None:
        self.faults: list[tuple[str, str, Answer]] = []
        self.seen: list[tuple[str, str]] = []
        self.namespaces: list[str] = []
        self.nodes: dict[str, dict[str, Any]] = {}
        self.behind = timedelta()
        for resource in (JOBS, PODS, SERVICES, EVENTS):
            self.resources[resource] = {"namespaced": True}

    async def __call__(self, raw: aiohttp.web.BaseRequest) -> aiohttp.web.StreamResponse:
        answer = await self._answer(raw)
        answer.headers["Date"] = format_datetime(datetime.now(UTC) - self.behind, usegmt=True)
        return answer

    async def _answer(self, raw: aiohttp.web.BaseRequest) -> aiohttp.web.StreamResponse:
        self.seen.append((raw.method, raw.path_qs))
        for fault in self.faults:
            method, part, answer = fault
            if raw.method == method and part in raw.path_qs:
                self.faults.remove(fault)
                return await answer(raw, lambda: self._as_usual(raw))
        return await self._as_usual(raw)

    async def _as_usual(self, raw: aiohttp.web.BaseRequest) -> aiohttp.web.StreamResponse:
        if found := re.fullmatch(r"/api/v1/nodes/([^/]+)", raw.path):
            return await self._node(raw, found[1])
        if found := re.fullmatch(r"/api/v1/namespaces(?:/([^/]+))?", raw.path):
            return await self._namespace(raw, found[1])
        return await super().__call__(raw)

    async def _namespace(self, raw: aiohttp.web.BaseRequest, name: str | None) -> aiohttp.web.Response:
        """kmock knows objects in namespaces only."""
        if raw.method == "POST":
            name = (await raw.json())["metadata"]["name"]
            if name in self.namespaces:
                return refusal(409, f'namespaces "{name}" already exists')
            self.namespaces.append(name)
        elif name not in self.namespaces:
            return refusal(404, f'namespaces "{name}" not found')
        elif raw.method == "DELETE":
            self.namespaces.remove(name)
        return aiohttp.web.json_response({"kind": "Namespace", "metadata": {"name": name}})

    def add_node(self, name: str, taints: list[dict[str, Any]]) -> dict[str, Any]:
        self.nodes[name] = {
            "kind": "Node",
            "metadata": {"name": name, "resourceVersion": "1"},
            "spec": {"taints": taints},
        }
        return self.nodes[name]

    async def _node(self, raw: aiohttp.web.BaseRequest, name: str) -> aiohttp.web.Response:
        """Nodes are in no namespace either; a merge patch replaces lists whole and is refused for a version that is past."""
        node = self.nodes.get(name)
        if node is None:
            return refusal(404, f'nodes "{name}" not found')
        if raw.method == "PATCH":
            if raw.content_type != "application/merge-patch+json":
                return refusal(415, f"the body of the request was in an unknown format: {raw.content_type}")
            patch = await raw.json()
            version = node["metadata"]["resourceVersion"]
            if patch["metadata"]["resourceVersion"] != version:
                return refusal(409, f'Operation cannot be fulfilled on nodes "{name}": the object has been modified')
            node["spec"] |= patch["spec"]
            node["metadata"]["resourceVersion"] = str(int(version) + 1)
        return aiohttp.web.json_response(node)

    async def _handle(self, request):
        if request.action == kmock.action.CREATE:
            request.data["metadata"] |= {"uid": str(uuid.uuid4()), "namespace": request.namespace}
        wanted = ((request.data or {}).get("preconditions") or {}).get("uid") if request.method == "DELETE" else None
        stored = self.find(str(request.resource.plural), request.name) if wanted else None
        if stored is not None and stored["metadata"]["uid"] != wanted:
            return refusal(409, "the UID in the precondition does not match")
        return await super()._handle(request)

    async def _serve_list(self, request):
        listed = await super()._serve_list(request)
        query = dict(part.split("=", 1) for part in (request.params or {}).values() if "=" in part)
        for key, value in query.items():
            listed["items"] = [item for item in listed["items"] if _fits(item, key, value)]
        return listed

    def find(self, plural: str, name: str | None = None) -> dict[str, Any] | None:
        """The stored object; its dictionary may be changed."""
        for (resource, _, stored), thing in self.objects.items():
            if resource.plural == plural and name in (None, stored) and not thing.deleted:
                return thing.raw
        return None

    def put(self, resource: str, name: str, thing: dict[str, Any]) -> dict[str, Any]:
        """Store an object as a controller would have made it."""
        metadata = {"name": name, "namespace": self.namespace, "uid": str(uuid.uuid4())} | thing.pop("metadata", {})
        self.objects[resource, self.namespace, name] = {"metadata": metadata, **thing}
        return self.objects[resource, self.namespace, name].raw

    def remove(self, resource: str, name: str) -> None:
        del self.objects[resource, self.namespace, name]

    @property
    def job(self) -> dict[str, Any]:
        """The only Job."""
        found = self.find("jobs")
        assert found is not None
        return found

    def names(self, plural: str) -> list[str]:
        return [
            n for (resource, _, n), thing in self.objects.items() if resource.plural == plural and not thing.deleted
        ]

    def end(self, kind: str, reason: str = "", message: str = "", **status: Any) -> None:
        """Let the Job have a condition."""
        condition = {"type": kind, "status": "True", "reason": reason, "message": message}
        self.change(self.job, conditions=[*self.job.get("status", {}).get("conditions", []), condition], **status)

    def change(self, job: dict[str, Any], **status: Any) -> None:
        """Let a Job have another status."""
        self.objects[JOBS, self.namespace, job["metadata"]["name"]].patch({"status": status})

    def pod(self, index: int, status: dict[str, Any], **metadata: Any) -> dict[str, Any]:
        """A pod of the Job as its controller would make it."""
        template = self.job["spec"]["template"]
        name = f"{self.job['metadata']['name']}-{index}-{uuid.uuid4().hex[:5]}"
        annotations = template["metadata"]["annotations"] | {"batch.kubernetes.io/job-completion-index": str(index)}
        meta = {"labels": template["metadata"]["labels"], "annotations": annotations} | metadata
        return self.put(PODS, name, {"metadata": meta, "spec": {"nodeName": f"gpu-{index}"}, "status": status})

    def event(self, about: dict[str, Any], reason: str, message: str) -> None:
        now = datetime.now(UTC)
        involved = {"uid": about["metadata"]["uid"]}
        body = {"involvedObject": involved, "reason": reason, "message": message, "lastTimestamp": stamp(now)}
        self.put(EVENTS, uuid.uuid4().hex, body)


def stamp(moment: datetime) -> str:
    """As the API writes times."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def ago(seconds: float) -> str:
    return stamp(datetime.now(UTC) - timedelta(seconds=seconds))


def refusal(status: int, message: str, **headers: str) -> aiohttp.web.Response:
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status, "message": message}
    return aiohttp.web.json_response(body, status=status, headers=headers)


def refuse(status: int, message: str = "") -> Answer:
    """Answer with an error and do nothing."""

    async def answer(raw, go_on):
        return refusal(status, message)

    return answer


async def drop_mid_answer(raw, go_on):
    """Do nothing, begin to answer, and hang up."""
    response = aiohttp.web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(raw)
    await response.write(b'{"kind": "Jo')
    raw.transport.abort()
    return response


async def do_and_hang_up(raw, go_on):
    """Do what was asked for, and hang up before the answer."""
    answer = await go_on()
    raw.transport.abort()
    return answer


def _fits(item: dict[str, Any], key: str, value: str) -> bool:
    if key == "involvedObject.uid":
        return bool(item["involvedObject"]["uid"] == value)
    return bool(item["metadata"].get("labels", {}).get(key) == value)


@contextmanager
def running_cluster(kubeconfig: Path) -> Iterator[Cluster]:
    """A cluster in a thread of its own, and a kubeconfig that names it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> tuple[Cluster, kmock.Server]:
        cluster = Cluster()
        cluster.prepare()
        await cluster.__aenter__()
        server = kmock.Server(cluster)
        await server.__aenter__()
        return cluster, server

    async def stop() -> None:
        await server.__aexit__(None, None, None)
        await cluster.__aexit__(None, None, None)

    cluster, server = asyncio.run_coroutine_threadsafe(start(), loop).result(20)
    named = {"cluster": "emulated", "user": "tester"}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "emulated", "cluster": {"server": str(server.url).rstrip("/")}}],
        "users": [{"name": "tester", "user": {"token": "valid"}}],
        "contexts": [{"name": "emulated", "context": named}],
        "current-context": "emulated",
    }
    kubeconfig.write_text(yaml.safe_dump(config))
    try:
        yield cluster
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()


def bodies(cluster: Cluster, method: str) -> list[dict[str, Any]]:
    """What was sent with every request of a method."""
    return [json.loads(request.body) for request in cluster if str(request.method).endswith(method) and request.body]
