"""What a job's supervision tells others: a server that is away for a while must not end, or hold up, the job."""

import time
from collections.abc import Callable

LATER_S = 30.0


class Reports:
    """Tells, and where that fails tries again later; the job goes on.

    Args:
        on_untold: told of the first error of each outage.
        clock: seconds.
    """

    def __init__(self, on_untold: Callable[[Exception], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._on_untold, self._clock = on_untold, clock
        self._not_before = float("-inf")
        self._is_out = False

    def tell(self, report: Callable[[], None], *, even_if_out: bool = False) -> bool:
        """Whether it could be told. Interruptions pass through: they are the run's own."""
        if not even_if_out and self._clock() < self._not_before:
            return False
        try:
            report()
        except Exception as error:
            # Whatever it was: MLflow's and Prefect's clients have many errors, and none is the job's.
            self._not_before = self._clock() + LATER_S
            if not self._is_out:
                self._is_out = True
                self._on_untold(error)
            return False
        self._is_out = False
        return True
