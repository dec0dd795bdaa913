"""SIGINT and SIGTERM: finish the step, save, end."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from internvl import dist, log
from internvl.errors import Interrupted

IN_EVALUATION = "stopped during an evaluation"


class Stop:
    """Records that a signal asked to stop; the loop reads it after every step."""

    asked = False

    def agreed(self) -> bool:
        """True on every rank if any rank was asked: all of them stop after the same step."""
        return dist.sum_counts({"asked": float(self.asked)})["asked"] > 0


_current: list[Stop] = []


def raise_if_asked() -> None:
    """Raises Interrupted with the text `IN_EVALUATION` if a signal asked this rank to stop."""
    if any(stop.asked for stop in _current):
        raise Interrupted(IN_EVALUATION)


@contextmanager
def stop_signal() -> Iterator[Stop]:
    """Context in which SIGINT and SIGTERM end the run after the current step, a second SIGINT at
    once."""
    stop, process = Stop(), os.getpid()

    def ask(signum: int, frame: Any) -> None:
        # A terminal sends Ctrl-C to loader workers too, which were forked with this handler.
        if os.getpid() != process:
            return
        # SIGTERM may come again and again: a scheduler repeats it while the checkpoint is written.
        if stop.asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        stop.asked = True
        log.get_logger().info("stopping after this step; once more to stop at once")

    before = {signum: signal.signal(signum, ask) for signum in (signal.SIGINT, signal.SIGTERM)}
    _current.append(stop)
    try:
        yield stop
    finally:
        _current.remove(stop)
        for signum, handler in before.items():
            signal.signal(signum, handler)
