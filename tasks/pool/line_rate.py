"""Keeps the flow's log readable: nodes may write more lines than anybody, or Prefect's server, can take."""

import time
from collections import Counter
from collections.abc import Callable

from tasks.contracts.job import LogLine

LINES_PER_S = 20
BURST = 200
"""Lines at once: what a start writes, or a traceback."""


class LineRate:
    """Passes lines on, of each node ``LINES_PER_S`` on average; of what it leaves out it says how much, and where it is.

    Args:
        on_line: takes the lines that pass.
        clock: seconds.
    """

    def __init__(self, on_line: Callable[[LogLine], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._on_line, self._clock = on_line, clock
        self._allowance: dict[int, tuple[float, float]] = {}
        self._left_out: Counter[int] = Counter()

    def take(self, line: LogLine) -> None:
        """Pass the line on, or count it."""
        now = self._clock()
        allowed, since = self._allowance.get(line.node, (float(BURST), now))
        allowed = min(float(BURST), allowed + (now - since) * LINES_PER_S)
        if allowed >= 1:
            self._tell(line.node)
            self._on_line(line)
            allowed -= 1
        else:
            self._left_out[line.node] += 1
        self._allowance[line.node] = (allowed, now)

    def tick(self) -> None:
        """There is nothing new: a good moment to say what was left out."""
        for node in list(self._left_out):
            self._tell(node)

    finish = tick

    def _tell(self, node: int) -> None:
        if count := self._left_out.pop(node, 0):
            self._on_line(LogLine(node, f"... {count:,} lines left out here; all of them are in node-{node}.log"))
