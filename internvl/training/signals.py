"""SIGINT and SIGTERM: finish the step, save, end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from internvl import dist, log


class Stop:
    """Whether a signal asked to stop; the loop looks after every step."""

    asked = False

    def agreed(self) -> bool:
        """Whether any rank was asked to: all of them stop after the same step."""
        return dist.sum_counts({"asked": float(self.asked)})["asked"] > 0


@contextmanager
def stop_signal() -> Iterator[Stop]:
    """SIGINT and SIGTERM end the run after the current step; a second SIGINT ends it at once."""
    stop = Stop()

    def ask(number: int, frame: Any) -> None:
        if stop.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.asked = True
        log.get_logger().info("stopping after this step; once more to stop at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
