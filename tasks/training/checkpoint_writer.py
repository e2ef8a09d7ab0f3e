"""Writes checkpoints beside training: one at a time, and a failed write does not end the run."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.contracts.attempt import Attempt
from tasks.training.checkpoints import Snapshot, prune, write_checkpoint


@dataclass
class CheckpointWriter:
    """A thread that writes; its errors surface in the thread that trains.

    Attributes:
        keep: newest checkpoints that stay, besides the best one.
        flush_ledger: makes the lines of all steps up to a checkpoint's durable before that checkpoint counts.
        failures: writes that failed for want of a disk, each in words.
    """

    checkpoints: Path
    attempt: Attempt
    binding: Mapping[str, Any]
    world_size: int
    keep: int
    flush_ledger: Callable[[int], None]
    say: Callable[[str], None]
    failures: list[str] = field(default_factory=list)
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    _running: Future[None] | None = None

    def submit(self, snapshot: Snapshot) -> None:
        """Write a snapshot in the background, after the one before it."""
        self.join()
        self._running = self._thread.submit(self._write, snapshot)

    def check(self) -> None:
        """Raise what ended a write that is over, if training must not go on after it."""
        if self._running is not None and self._running.done():
            self.join()

    def join(self) -> None:
        """Wait until nothing is being written.

        Raises:
            StaleAttempt: a newer attempt exists; this one must end.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _write(self, snapshot: Snapshot) -> None:
        try:
            self.flush_ledger(snapshot.step)
            write_checkpoint(
                self.checkpoints,
                snapshot,
                binding=self.binding,
                world_size=self.world_size,
                before_commit=self.attempt.check_newest,
            )
            prune(self.checkpoints, self.keep)
        except OSError as error:
            self.failures.append(f"step {snapshot.step}: {error}")
            self.say(
                f"CHECKPOINT NOT WRITTEN at step {snapshot.step}: {error}. Training goes on; the checkpoint before stays. "
                "Free some space on storage.shared: a run that dies now repeats every step since then"
            )
