"""Requests read ahead of the GPU, in threads or worker processes, in the order they are begun.

Decoding and resizing leave Python's lock to others for most of their time, but not for all of it:
at 40 requests of 7 tiles a second, threads hold it a third of the time, and whoever begins the
GPU's work waits for it. Worker processes hand tiles over in shared memory instead.
"""

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

from torch.utils.data import Dataset

from internvl.data.workers import START_METHOD, Reading, usable_cores
from internvl.inference.engine.scheduler import Job
from internvl.inference.requests import Prompt


class Prompts:
    """A `Source` that encodes requests, some ahead of the one that is taken."""

    def __init__(
        self,
        read: Callable[[int], Prompt],
        job: Callable[[int, Prompt], Job],
        order: Sequence[int],
        *,
        ahead: int,
        most: int,
        pin: bool = False,
        processes: int = 0,
    ) -> None:
        """An exception of `read` is raised where the job is taken.

        Args:
            read: encodes request i. job: makes a job of it, in this process.
            order: requests in the order in which they are begun.
            ahead: most requests that are read and not taken.
            most: jobs whose text reaches so many tokens go to `too_long` instead.
            pin: put tiles into memory that a GPU copies from while the host goes on.
            processes: how many read, see `processes_for`; 0: threads do.
        """
        self.job = job
        self.most = most
        self.pin = pin
        self.too_long: list[Job] = []
        """Jobs for `generate`."""
        self.read_ahead: _Threads | _Processes
        if processes:
            self.read_ahead = _Processes(read, order, self._pinned, ahead, processes)
        else:
            self.read_ahead = _Threads(read, order, self._pinned, ahead)

    def __enter__(self) -> "Prompts":
        return self

    def __exit__(self, *error: object) -> None:
        self.read_ahead.close()

    def take(self, *, wait: bool) -> Job | None:
        """Returns the next request as a job; see `Source`."""
        while (encoded := self.read_ahead.take(wait=wait)) is not None:
            job = self.job(*encoded)
            if job.text_length < self.most:
                return job
            self.too_long.append(job)
        return None

    def _pinned(self, prompt: Prompt) -> Prompt:
        # A tensor that is on a GPU already stays there.
        if not self.pin or prompt.tiles is None or prompt.tiles.is_cuda:
            return prompt
        return replace(prompt, tiles=prompt.tiles.pin_memory())


class _Threads:
    """Encodes requests in threads."""

    def __init__(
        self,
        read: Callable[[int], Prompt],
        order: Sequence[int],
        finish: Callable[[Prompt], Prompt],
        ahead: int,
    ) -> None:
        self.read = read
        self.finish = finish
        self.left = iter(order)
        self.ahead = ahead
        # No more threads than requests: each would be started for nothing.
        threads = max(1, min(_THREADS, usable_cores(), len(order)))
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self.reading: deque[Future[tuple[int, Prompt]]] = deque()

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)

    def take(self, *, wait: bool) -> tuple[int, Prompt] | None:
        while len(self.reading) < self.ahead:
            index = next(self.left, None)
            if index is None:
                break
            self.reading.append(self.pool.submit(self._read, index))
        if not self.reading or not (wait or self.reading[0].done()):
            return None
        return self.reading.popleft().result()

    def _read(self, index: int) -> tuple[int, Prompt]:
        return index, self.finish(self.read(index))


class _Requests(Dataset[Prompt]):
    def __init__(self, read: Callable[[int], Prompt]) -> None:
        self.read = read

    def __getitem__(self, index: int) -> Prompt:
        return self.read(index)


class _Processes:
    """Encodes requests in worker processes, which a thread takes them from."""

    def __init__(
        self,
        read: Callable[[int], Prompt],
        order: Sequence[int],
        finish: Callable[[Prompt], Prompt],
        ahead: int,
        workers: int,
    ) -> None:
        self.order = order
        self.finish = finish
        # Bounded, for each request holds some megabytes of pinned memory.
        self.ready: queue.Queue[tuple[int, Prompt] | BaseException | None] = queue.Queue(ahead)
        self.closed = threading.Event()
        self.ended = False
        self.reading = Reading(
            _Requests(read),
            iter(order),
            name=lambda index, _: f"request {index}",
            # Of a worker that died: its requests by their positions, for they have no files.
            describe=lambda index: f"request {index}",
            workers=workers,
        )
        self.thread = threading.Thread(target=self._fetch, name="read", daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.closed.set()
        self.thread.join()

    def take(self, *, wait: bool) -> tuple[int, Prompt] | None:
        if self.ended:
            return None
        try:
            encoded = self.ready.get(block=wait)
        except queue.Empty:
            return None
        # An error ends the reading; whatever was read before it has been taken.
        if isinstance(encoded, BaseException):
            self.ended = True
            raise encoded
        self.ended = encoded is None
        return encoded

    def _fetch(self) -> None:
        try:
            # Closed in this thread, so that the workers end with it.
            with closing(iter(self.reading)) as prompts:
                for index, prompt in zip(self.order, prompts, strict=False):
                    if not self._put((index, self.finish(prompt))):
                        return
            self._put(None)
        except Exception as error:  # noqa: BLE001 (raised again by whoever takes the request)
            self._put(error)

    def _put(self, encoded: tuple[int, Prompt] | BaseException | None) -> bool:
        """Hands over a request once there is room; False if nobody takes any more."""
        while not self.closed.is_set():
            try:
                self.ready.put(encoded, timeout=0.1)
            except queue.Full:
                continue  # `close` may have been called meanwhile
            return True
        return False


_THREADS = 8
"""Most threads that read images; more of them would only wait for Python's lock."""

_WORKERS = 8
"""Most processes that do; each reads some 40 images of 7 tiles a second."""

_WORTH_FORKING = 64
"""Requests that make up for starting processes, some tenths of a second."""

_SHARED = 2**30
"""Bytes of shared memory that must be free: a container may have 64 MiB of it."""


def processes_for(count: int) -> int:
    """Returns how many worker processes should read `count` requests; 0: threads should."""
    # Requests are read by a closure, which no other process but a forked one has.
    if count < _WORTH_FORKING or START_METHOD != "fork":
        return 0
    try:
        shared = os.statvfs("/dev/shm")
    except OSError:
        return 0
    if shared.f_bavail * shared.f_frsize < _SHARED:
        return 0
    # One for whoever begins the GPU's work, one for the thread that takes what was read.
    return max(0, min(_WORKERS, usable_cores() - 2))
