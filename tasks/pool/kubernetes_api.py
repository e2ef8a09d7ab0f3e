"""The Kubernetes API for callers that are not asynchronous, from any thread: plain objects in, plain objects out.

kubernetes_asyncio finds the cluster and its credentials; objects stay the dictionaries of the API's JSON, so that what this
version of a client does not know of is neither lost nor refused. What is tried again is safe to be done twice.
"""

import asyncio
import atexit
import functools
import json
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from tasks.contracts.job import PoolError, SchedulerAway

REQUEST_LIMIT_S = 15
CLOSE_LIMIT_S = 5
WAITS_S = 0.5, 1.0, 2.0
"""Before each further try of a request that found no server, a busy one or a broken answer."""
MOMENTARY = {408, 410, 429, 500, 502, 503, 504}
IN_CLUSTER_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


class ApiError(PoolError):
    """The API refuses; ``status`` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


class Unreachable(SchedulerAway):
    """The API does not answer, or not with an answer: what it did is not known."""


class KubernetesApi:
    """One cluster, through one connection pool.

    Args:
        context: of the kubeconfig; None: the pod's service account, else the current context.
        config_file: the kubeconfig; None: the usual place.
    """

    def __init__(self, context: str | None, config_file: str | None) -> None:
        self._context, self._config_file = context, config_file
        self._client: Any = None
        self._ahead = timedelta()
        self._opening = asyncio.Lock()

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
    ) -> Any:
        """The answer's JSON.

        Args:
            path: absolute, as ``/api/v1/namespaces``.
            content_type: of ``body``; a PATCH has several.

        Raises:
            ApiError: refused, in the API's own words.
            Unreachable: no answer after several tries.
        """
        return json.loads(self.read(method, path, query=query, body=body, content_type=content_type))

    def read(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
    ) -> bytes:
        """The answer as it came. Raises as :meth:`request` does."""
        target = f"{path}?{urlencode(query)}" if query else path
        answer = asyncio.run_coroutine_threadsafe(self._until_answered(method, target, body, content_type), _loop())
        return answer.result()

    def now(self) -> datetime:
        """The time by the API server's clock, to a second, with a time zone; by this machine's until there was an answer.

        The times in objects are the server's, and this machine's clock may be minutes off.
        """
        return datetime.now(UTC) + self._ahead

    def close(self) -> None:
        """End the connections."""
        asyncio.run_coroutine_threadsafe(self._forget(), _loop()).result(CLOSE_LIMIT_S)

    async def _until_answered(self, method: str, target: str, body: Any, content_type: str) -> bytes:
        reloaded = False
        for wait_s in (*WAITS_S, None):
            try:
                status, data = await self._once(method, target, body, content_type)
            except (OSError, TimeoutError, _client_error()) as error:
                status, problem = 0, f"{type(error).__name__} {error}".strip()
            else:
                if 200 <= status < 300:
                    return data
                problem = _words(data)
                if status == 401 and not reloaded and wait_s is not None:
                    # A token that expired may have been renewed in the kubeconfig, or by its plugin.
                    reloaded = True
                    await self._forget()
                    continue
                if status not in MOMENTARY:
                    raise ApiError(status, f"{method} {target}: {problem}{self._advice(status, problem)}")
            if wait_s is not None:
                await asyncio.sleep(wait_s)
        where = self._client.configuration.host if self._client else "the cluster"
        raise Unreachable(f"{where} does not answer {method} {target}: {problem}; is it up? (kubectl cluster-info)")

    async def _once(self, method: str, target: str, body: Any, content_type: str) -> tuple[int, bytes]:
        client = await self._open()
        headers = {"Accept": "application/json", "Content-Type": content_type}
        await client.update_params_for_auth(headers, [], ["BearerToken"])
        answer = await client.rest_client.request(
            method,
            client.configuration.host + target,
            headers=headers,
            body=body,
            _preload_content=False,
            _request_timeout=REQUEST_LIMIT_S,
        )
        async with answer:
            if (date := answer.headers.get("Date")) is not None:
                # A proxy may write what is no date, or one without a time zone.
                with suppress(ValueError, TypeError):
                    self._ahead = parsedate_to_datetime(date) - datetime.now(UTC)
            return answer.status, await answer.read()

    async def _open(self) -> Any:
        try:
            from kubernetes_asyncio import client, config
        except ModuleNotFoundError as error:
            raise ApiError(0, "kubernetes_asyncio is not installed here: pip install -e '.[kubernetes]'") from error
        async with self._opening:
            if self._client is None:
                configuration = client.Configuration()
                try:
                    if self._context is None and self._config_file is None and IN_CLUSTER_TOKEN.exists():
                        config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
                    else:
                        await config.load_kube_config(
                            config_file=self._config_file, context=self._context, client_configuration=configuration
                        )
                except (config.ConfigException, OSError) as error:
                    raise ApiError(
                        0,
                        f"no cluster to ask: {error}; give a kubeconfig (KUBECONFIG) and a context in it "
                        f"(pool.kubernetes.context={self._context}), or set pool.backend=local",
                    ) from error
                self._client = client.ApiClient(configuration)
            return self._client

    async def _forget(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()

    def _advice(self, status: int, problem: str) -> str:
        if status == 401:
            who = f"context {self._context}" if self._context else "the current context or the pod's service account"
            return f"; the credentials of {who} have expired or are not known there: log in again"
        if status == 403 and 'resource "nodes"' in problem:
            return "; the right to taint nodes is given apart, by infra/kubernetes/node-taints"
        if status == 403 and "cannot" in problem:
            return "; infra/kubernetes/training-pool has a role with the rights that are needed"
        if status == 404 and problem.startswith("namespaces "):
            return "; make it (infra/kubernetes/training-pool), or set pool.kubernetes.namespace to one that is there"
        return ""


def open_api(context: str | None) -> KubernetesApi:
    """The cluster of the settings; asked again, the same connections."""
    return _open_api(context, os.environ.get("KUBECONFIG"))


@functools.cache
def _open_api(context: str | None, config_file: str | None) -> KubernetesApi:
    api = KubernetesApi(context, config_file)
    atexit.register(api.close)
    return api


def path_of(api_version: str, namespace: str, plural: str, name: str = "", *parts: str) -> str:
    """The URL's path of objects in a namespace."""
    root = f"/api/{api_version}" if "/" not in api_version else f"/apis/{api_version}"
    return "/".join([root, "namespaces", *(quote(part, safe="") for part in (namespace, plural, name, *parts) if part)])


def _words(data: bytes) -> str:
    """What the API says in its Status, or else the answer itself."""
    try:
        message = json.loads(data)["message"]
    except (ValueError, TypeError, KeyError):
        message = data.decode(errors="replace")[:500]
    return str(message).strip() or "no reason given"


@functools.cache
def _client_error() -> type[Exception]:
    from aiohttp import ClientError

    return ClientError


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """One event loop for all: connections belong to theirs, and callers come from many threads."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="kubernetes-api", daemon=True).start()
    return loop
