"""The objects of one attempt in the cluster: made, read and deleted, each with one request.

``handle.json`` in the attempt's folder says where they are: ``{"namespace": ..., "job": ..., "token": ...}``. It is written
before anything is made, and the token is on every object: whatever happens, they are found, and nobody else's are taken for them.
The Job's ``uid`` is added once all is made: only then does a Job that is not there mean one that is gone.
"""

from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from tasks.contracts.files import read_json, write_json, write_text
from tasks.contracts.job import PoolError
from tasks.pool.kubernetes_api import ApiError, KubernetesApi, Unreachable, path_of
from tasks.pool.kubernetes_objects import CONTAINER, TOKEN, render_service
from tasks.pool.kubernetes_status import index_of

Object = dict[str, Any]

NUM_LAST_LINES = 15
NOT_FOUND, CONFLICT = 404, 409


class AttemptObjects:
    """The Job of an attempt, its Service and its pods.

    Raises:
        PoolError: every method, if the API refuses or does not answer.
    """

    def __init__(self, api: KubernetesApi, attempt: Path) -> None:
        self._api, self._attempt = api, attempt
        record = read_json(attempt / "handle.json")
        self.namespace, self.name, self.token = record["namespace"], record["job"], record["token"]

    @classmethod
    def record(cls, api: KubernetesApi, attempt: Path, rendered: Object, token: str) -> "AttemptObjects":
        """Write down what is going to be made."""
        meta = rendered["metadata"]
        write_text(attempt / "job.yaml", yaml.safe_dump(rendered, sort_keys=False))
        write_json(attempt / "handle.json", {"namespace": meta["namespace"], "job": meta["name"], "token": token})
        return cls(api, attempt)

    def create(self) -> None:
        """The Job and then its Service, which belongs to it from the start: nothing half made can stay."""
        rendered = self._rendered()
        try:
            job = self._api.request("POST", path_of("batch/v1", self.namespace, "jobs"), body=rendered)
        except ApiError as error:
            if error.status != CONFLICT:
                raise
            # Our own, whose answer was lost on its way so that the request was sent again; or somebody else's.
            found = self.job()
            if found is None:
                raise PoolError(
                    f"a Job {self.name} is in namespace {self.namespace} already and is not this attempt's (label {TOKEN}): "
                    "another installation has the same storage path; use another namespace, or delete that Job"
                ) from error
            job = found
        try:
            self.complete(job)
        except PoolError:
            # Where the API has just gone away this fails as well, and the next submission makes it whole.
            with suppress(Unreachable):
                self.delete_job(job)
            raise

    def complete(self, job: Object) -> None:
        """The Service of a Job, if it has none, and the record that both were made."""
        uid = job["metadata"]["uid"]
        service = render_service(self._rendered(), uid)
        try:
            self._api.request("POST", path_of("v1", self.namespace, "services"), body=service)
        except ApiError as error:
            if error.status != CONFLICT:
                raise
        write_json(self._attempt / "handle.json", read_json(self._attempt / "handle.json") | {"uid": uid})

    @property
    def was_made(self) -> bool:
        """Whether the submission went through."""
        return "uid" in read_json(self._attempt / "handle.json")

    def now(self) -> datetime:
        """The time by the clock that wrote the times in objects."""
        return self._api.now()

    def job(self) -> Object | None:
        """The Job; None if there is none (another's of that name is not it)."""
        try:
            job: Object = self._api.request("GET", path_of("batch/v1", self.namespace, "jobs", self.name))
        except ApiError as error:
            if error.status == NOT_FOUND:
                return None
            raise
        return job if job["metadata"].get("labels", {}).get(TOKEN) == self.token else None

    def pods(self) -> list[Object]:
        """Its pods, also those whose Job is gone, in the order of their ranks."""
        query = {"labelSelector": f"{TOKEN}={self.token}"}
        listed = self._api.request("GET", path_of("v1", self.namespace, "pods"), query=query)
        return sorted(listed["items"], key=index_of)

    def pod_log(self, pod: Object) -> str:
        """The last lines of a pod's own log; empty where it has none or may not be read."""
        path = path_of("v1", self.namespace, "pods", pod["metadata"]["name"], "log")
        query = {"container": CONTAINER, "tailLines": str(NUM_LAST_LINES)}
        try:
            return self._api.read("GET", path, query=query).decode(errors="replace").strip()
        except ApiError:
            return ""

    def events(self, about: Object) -> list[Object]:
        """Events about an object; none where they may not be read, since they only explain."""
        query = {"fieldSelector": f"involvedObject.uid={about['metadata']['uid']}"}
        try:
            listed = self._api.request("GET", path_of("v1", self.namespace, "events"), query=query)
        except ApiError:
            return []
        return list(listed["items"])

    def workload(self, job: Object) -> Object | None:
        """What Kueue keeps of a Job in its queue; None where it cannot be asked, since it only explains."""
        query = {"labelSelector": f"kueue.x-k8s.io/job-uid={job['metadata']['uid']}"}
        try:
            # Kueue's versions move: the cluster tells which it prefers.
            version = self._api.request("GET", "/apis/kueue.x-k8s.io")["preferredVersion"]["groupVersion"]
            listed = self._api.request("GET", path_of(version, self.namespace, "workloads"), query=query)
        except ApiError:
            return None
        return listed["items"][0] if listed["items"] else None

    def delete_job(self, job: Object) -> None:
        """Ask for the end of the Job, which stays until its pods are gone."""
        path = path_of("batch/v1", self.namespace, "jobs", self.name)
        self._delete(path, job["metadata"], {"propagationPolicy": "Foreground"})

    def delete_pod_by_force(self, pod: Object) -> None:
        """Forget a pod whose node does not answer.

        Should it still run, its attempt is no longer the newest, and it may not write results.
        """
        path = path_of("v1", self.namespace, "pods", pod["metadata"]["name"])
        self._delete(path, pod["metadata"], {"gracePeriodSeconds": 0})

    def _delete(self, path: str, meta: Mapping[str, Any], options: Object) -> None:
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "preconditions": {"uid": meta["uid"]}, **options}
        try:
            self._api.request("DELETE", path, body=body)
        except ApiError as error:
            # Gone already, or another of that name.
            if error.status not in (NOT_FOUND, CONFLICT):
                raise

    def _rendered(self) -> Object:
        rendered: Object = yaml.safe_load((self._attempt / "job.yaml").read_text())
        return rendered
