"""What the Job controller and the nodes of an emulated cluster do: every pod's container is a process on this machine."""

import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from typing import Any

from tasks.hardware.host import free_port
from tests.pool.emulated_cluster import JOBS, PODS, Cluster


class Nodes:
    """Runs the pods of every Job of a cluster while it is entered."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._running: dict[str, list[subprocess.Popen[bytes]]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop)

    def __enter__(self) -> "Nodes":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        for processes in self._running.values():
            for process in processes:
                process.kill()
                process.wait()

    def _loop(self) -> None:
        while not self._stop.wait(0.05):
            for name in self._cluster.names("jobs"):
                job = self._cluster.find("jobs", name)
                if job is not None:
                    self._sync(name, job)

    def _sync(self, name: str, job: dict[str, Any]) -> None:
        if name not in self._running:
            job["metadata"]["finalizers"] = ["foregroundDeletion"]
            self._running[name] = self._start(job)
        processes = self._running[name]
        codes = [process.poll() for process in processes]
        num_running = codes.count(None)
        kinds = {condition["type"] for condition in job.get("status", {}).get("conditions", [])}
        if job["metadata"].get("deletionTimestamp"):
            self._end(processes)
            for pod in self._cluster.names("pods"):
                if pod.startswith(name):
                    self._cluster.remove(PODS, pod)
            self._cluster.remove(JOBS, name)
            return
        failed = [code for code in codes if code]
        if failed:
            message = f"Container ranks for pod team/{name} failed with exit code {failed[0]} matching FailJob rule"
            if "FailureTarget" not in kinds:
                self._condition(job, "FailureTarget", message)
                self._end(processes)
            elif "Failed" not in kinds:
                self._condition(job, "Failed", message)
        elif not num_running and "Complete" not in kinds:
            self._condition(job, "Complete", "")
        self._cluster.change(job, ready=num_running, succeeded=codes.count(0), failed=len(failed))

    def _condition(self, job: dict[str, Any], kind: str, message: str) -> None:
        condition = {
            "type": kind,
            "status": "True",
            "reason": "PodFailurePolicy" if message else "",
            "message": message,
        }
        self._cluster.change(job, conditions=[*job.get("status", {}).get("conditions", []), condition])

    def _start(self, job: dict[str, Any]) -> list[subprocess.Popen[bytes]]:
        name = job["metadata"]["name"]
        address = f"127.0.0.1:{free_port()}"
        container = job["spec"]["template"]["spec"]["containers"][0]
        # Here every pod has this machine's address.
        command = [_read(word).replace(f"{name}-0.{name}:29400", address) for word in container["command"]]
        env = {e["name"]: _read(e["value"]) if "value" in e else "127.0.0.1" for e in container["env"]}
        processes = []
        for index in range(job["spec"]["completions"]):
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=container["workingDir"],
                    env={"PATH": os.environ["PATH"]} | env | {"JOB_COMPLETION_INDEX": str(index)},
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
            labels = job["spec"]["template"]["metadata"]["labels"]
            pod = {"metadata": {"labels": labels}, "spec": {}, "status": {"phase": "Running"}}
            self._cluster.put(PODS, f"{name}-{index}-abcde", pod)
        return processes

    def _end(self, processes: list[subprocess.Popen[bytes]]) -> None:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + 15
        for process in processes:
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            # What is left in a container ends with it.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _read(text: str) -> str:
    return text.replace("$$", "$")
