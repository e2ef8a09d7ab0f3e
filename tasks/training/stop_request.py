"""A scheduler's notice that this rank must go: heard at once, obeyed by all ranks after the same step."""

import os
import signal
from types import FrameType


class StopRequest:
    """Whether SIGTERM or SIGUSR1 has reached this rank."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def listen(self) -> None:
        """From now on these signals ask instead of ending the process."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.signal = number


def leave_silently() -> None:
    """End this rank as torchrun would: rank 0 tells why, and its error alone counts as the cause."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
