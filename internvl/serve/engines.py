"""Threads that own a model each: jobs in, tokens out, told to the event loop.

A thread loads its model, then answers until it is closed. What happens to it is seen from outside:
`ready`, or the `error` that it died of.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

from internvl import log
from internvl.errors import UserError, explain
from internvl.serve.errors import ApiError, unavailable

T = TypeVar("T")


class Answering(Protocol):
    """What an engine thread runs, built in that thread."""

    @property
    def slots(self) -> int:
        """Jobs at a time."""
        ...

    def run(self, queue: "JobQueue[Any]", tell: Callable[[Any], None]) -> None:
        """Answers jobs until the queue is closed; calls `tell(job)` whenever one has more."""
        ...


class JobQueue(Generic[T]):
    """Jobs for one thread; a `Source` of the scheduler."""

    def __init__(self) -> None:
        self._jobs: deque[T] = deque()
        self._changed = threading.Condition()
        self.closed = False

    def put(self, job: T) -> None:
        """Appends a job."""
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()

    def take(self, *, wait: bool) -> T | None:
        """Returns the next job, or None if none is there; with `wait`, None means the end."""
        with self._changed:
            while wait and not self._jobs and not self.closed:
                self._changed.wait()
            # Also after closing: what is there is still answered.
            return self._jobs.popleft() if self._jobs else None

    def close(self) -> None:
        """Ends the thread after the jobs that are there."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()


class Engine(Generic[T]):
    """A thread that owns a model."""

    def __init__(
        self,
        build: Callable[[], Answering],
        wake: Callable[[T], None],
        changed: Callable[[], None],
    ) -> None:
        """Begins to load at once.

        Args:
            build: loads the model; called in the thread.
            wake: called on the event loop for every job that has more.
            changed: called on the event loop when the engine is ready or has died.
        """
        self.queue: JobQueue[T] = JobQueue()
        self.answering: Any = None
        """What `build` returned, once it has."""
        self.error: BaseException | None = None
        self.running = 0
        """Jobs that were put and have not ended."""
        self._build = build
        self._wake = wake
        self._changed = changed
        # Its own thread cannot ask for it.
        self._loop = asyncio.get_running_loop()
        self._told: deque[T] = deque()
        self._lock = threading.Lock()
        self._is_waking = False
        # An executor: an exception of the thread is kept, and seen below.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._thread.submit(self._work).add_done_callback(self._ended)

    @property
    def ready(self) -> bool:
        """True while it answers."""
        return self.answering is not None and self.error is None

    def close(self) -> None:
        """Ends the thread after the jobs that are there."""
        self.queue.close()
        self._thread.shutdown(wait=True)

    def _work(self) -> None:
        answering = self._build()
        self._loop.call_soon_threadsafe(self._begun, answering)
        answering.run(self.queue, self._tell)

    def _begun(self, answering: Answering) -> None:
        # On the event loop, both at once: no request finds it ready before the routes know it.
        self.answering = answering
        self._changed()

    def _tell(self, job: T) -> None:
        """Wakes whoever waits for a job; once for all jobs of a step, in the thread's interest."""
        with self._lock:
            self._told.append(job)
            if self._is_waking:
                return
            self._is_waking = True
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        with self._lock:
            # Swapped under the lock, worked on outside of it: the engine must not wait.
            jobs, self._told = self._told, deque()
            self._is_waking = False
        # Several tokens of a job wake it once.
        for job in dict.fromkeys(jobs):
            self._wake(job)

    def _ended(self, done: Future[None]) -> None:
        error = done.exception()
        if error is None:
            return
        self.error = error
        # What the user can put right is said by its sentence; a trace would bury it.
        trace = None if isinstance(error, UserError) else error
        log.get_logger().error("an engine died: %s", explain(error), exc_info=trace)
        # The loop is closed if it died while the server stopped.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._changed)


class Engines(Generic[T]):
    """Several engines of one model; a job goes to the one with the fewest."""

    def __init__(self, engines: Sequence[Engine[T]]) -> None:
        self.engines = engines

    @property
    def error(self) -> BaseException | None:
        """The exception that one of them died of."""
        return next((engine.error for engine in self.engines if engine.error is not None), None)

    @property
    def ready(self) -> bool:
        """True while all of them answer."""
        return all(engine.ready for engine in self.engines)

    @property
    def slots(self) -> int:
        """Jobs that all of them answer at a time, once they are ready."""
        return sum(engine.answering.slots for engine in self.engines)

    def check(self) -> None:
        """Raises ApiError 503 unless all of them answer."""
        if self.error is not None:
            # A minute: whatever watches the server has to start it again.
            raise unavailable(f"the engine died: {explain(self.error)}; start the server again", 60)
        if not self.ready:
            raise unavailable("the model is loading")

    def choose(self) -> Engine[T]:
        """Returns the engine with the fewest jobs."""
        return min(self.engines, key=lambda engine: engine.running)

    def close(self) -> None:
        """Ends all threads after the jobs that are there."""
        for engine in self.engines:
            engine.close()


class Gate:
    """Counts requests from their arrival to their end, and lets in so many."""

    def __init__(self, most_waiting: int) -> None:
        self.most_waiting = most_waiting
        self.slots = 1
        """Requests that are answered at a time, known once the model is there."""
        self.inside = 0

    def enter(self, count: int = 1) -> None:
        """Lets `count` answers in.

        Raises:
            ApiError: 429, or 400 if so many never fit.
        """
        most = self.slots + self.most_waiting
        # It would be told to come back for ever.
        if count > most:
            raise ApiError(f"n = {count}, and this server holds {most} answers", param="n")
        if self.inside + count > most:
            raise ApiError(
                f"{self.inside} requests are answered or wait, and {most} may; try again",
                status=429,
                code="queue_full",
                retry_s=2,
            )
        self.inside += count

    def leave(self, count: int = 1) -> None:
        """Lets `count` answers out."""
        self.inside -= count
