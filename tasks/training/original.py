"""The original model, which a run reads and never writes: its digest before and after, taken beside other work.

A digest reads every byte of the weights, seconds of an 8B model and more of larger ones, in which a rank has a model to load or
a checkpoint to see written.
"""

from concurrent.futures import Future
from pathlib import Path

from tasks.contracts.daemon_threads import begin
from tasks.models.materialise import weights_digest


class Original:
    """A model's folder from the start of a run on; its first digest is begun at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # A rank that fails while it loads does not wait for it.
        self._before = begin(weights_digest, folder)
        self._after: Future[str] | None = None

    def digest(self) -> str:
        """SHA-256 over the weights as they were at the start."""
        return self._before.result()

    def look_again(self) -> None:
        """After training: begin to take the digest once more."""
        self._after = begin(weights_digest, self._folder)

    def check(self) -> None:
        """Wait for the second digest, once it was begun.

        Raises:
            RuntimeError: the weights are others than at the start.
        """
        assert self._after is not None
        if (after := self._after.result()) != (before := self.digest()):
            raise RuntimeError(
                f"the original model in {self._folder} changed during training: {before} became {after}; "
                "its results cannot be compared"
            )
