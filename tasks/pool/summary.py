"""What became of an attempt, in one file that people and programs can read without the scheduler: ``summary.json``."""

import time
from pathlib import Path

from tasks.contracts.files import read_json, write_json
from tasks.contracts.job import JobSpec, JobState
from tasks.pool.torchrun_files import HOST

SUMMARY = "summary.json"


class Summary:
    """Collects the states of an attempt as they are seen."""

    def __init__(self, job: JobSpec, attempt: Path) -> None:
        self._job, self._attempt = job, attempt
        self._states: list[dict[str, str | float]] = []

    def saw(self, state: JobState) -> None:
        """The job is in another state."""
        self._states.append({"state": state.value, "time": time.time()})

    def write(self, state: JobState, error: str | None) -> None:
        """The attempt has ended."""
        self.saw(state)
        handle = self._attempt / "handle.json"
        write_json(
            self._attempt / SUMMARY,
            {
                "job": self._job.name,
                "attempt": self._attempt.name,
                "handle": read_json(handle) if handle.exists() else None,
                "module": self._job.module,
                "num_nodes": self._job.num_nodes,
                "processes_per_node": self._job.processes_per_node,
                "gpus": self._job.gpus,
                "state": state.value,
                "error": error,
                "states": self._states,
                "hosts": {
                    str(node): read_json(path)["host"]
                    for node in range(self._job.num_nodes)
                    if (path := self._attempt / HOST.format(node=node)).exists()
                },
                "logs": [f"node-{node}.log" for node in range(self._job.num_nodes)],
            },
        )
