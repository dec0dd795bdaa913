"""An engine in a process of its own: jobs go there, tokens come back, once a step for all of them.

Whatever the server's threads do (bodies, images, events of a stream), they hold Python's lock, and
the thread that begins the GPU's work would ask for it hundreds of times a step.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from internvl import log
from internvl.errors import RunError, UserError, explain
from internvl.inference.engine import Job
from internvl.inference.requests import Prompt
from internvl.inference.settings import Settings
from internvl.serve.engines import Answering, JobQueue
from internvl.serve.rendering import Served


@dataclass(frozen=True)
class _Begin:
    """A job on its way to the process; its tiles follow as plain bytes."""

    key: int
    input_ids: np.ndarray
    begun: tuple[int, ...]
    shape: tuple[int, ...] | None
    """Of the tiles; None without images."""
    dtype: torch.dtype
    settings: Settings
    top_logprobs: int | None
    adapter: int
    since_s: float


@dataclass(frozen=True)
class _News:
    """What a job has more since the last time."""

    key: int
    tokens: list[int]
    logprobs: list[tuple[float, list[tuple[int, float]]]]
    ended: bool


class Apart:
    """What an engine's thread runs while the model is in another process; see `Answering`."""

    def __init__(self, load: Callable[[], Answering]) -> None:
        """Begins the process and waits until its model is loaded.

        Args:
            load: builds what answers; called in the process, so that it must be picklable.

        Raises:
            UserError: the model cannot be loaded, or the process has ended.
        """
        # Not forked: a process that has looked for a GPU cannot hand it to a copy of itself.
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        level = log.get_logger().getEffectiveLevel()
        self._process = context.Process(target=_work, args=(load, theirs, level), name="engine")
        self._process.start()
        # The only other copy: its end is seen when the process ends.
        theirs.close()
        # A job is two writes, and a cancellation must not come between them.
        self._writing = threading.Lock()
        self._jobs: dict[int, Job] = {}
        self._cancelled: set[int] = set()
        self.served: Served = self._receive()

    @property
    def slots(self) -> int:
        """See `Answering`."""
        return self.served.slots

    def run(self, queue: JobQueue[Any], tell: Callable[[Any], None]) -> None:
        """Hands over jobs and their tokens until the queue is closed; see `Answering`.

        Raises:
            RunError: the process has ended, or takes no more jobs.
        """
        sender = threading.Thread(target=self._send_all, args=(queue,), name="jobs", daemon=True)
        sender.start()
        try:
            while (news := self._receive()) is not None:
                self._take_in(news, tell)
            # Its end without ours: what reads its jobs has failed, and is not done.
            if not queue.closed:
                raise RunError("its process takes no more jobs")
        finally:
            # No job waits for a process that has ended.
            queue.close()
            self._process.join(_LONGEST_END_S)
            self._process.kill()

    def _take_in(self, news: list[_News], tell: Callable[[Any], None]) -> None:
        for more in news:
            job = self._jobs[more.key]
            # In this order: whoever reads the tokens in another thread reads as many of these.
            job.logprobs += more.logprobs
            job.generated += more.tokens
            if more.ended:
                job.ended = True
                del self._jobs[more.key]
                self._cancelled.discard(more.key)
            tell(job)
        # As often as there are tokens, which is as often as a slot can become free.
        for key, job in list(self._jobs.items()):
            if job.cancelled and key not in self._cancelled:
                self._cancelled.add(key)
                with contextlib.suppress(OSError):
                    self._send(key)

    def _receive(self) -> Any:
        """Returns the next message of the process.

        Raises:
            UserError: it could not load its model, or it has ended.
        """
        try:
            message = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(_LONGEST_END_S)
            code = self._process.exitcode
            raise RunError(f"its process has ended with exit code {code}") from None
        if isinstance(message, UserError):
            raise message
        return message

    def _send_all(self, queue: JobQueue[Job]) -> None:
        """Sends jobs until the queue is closed; runs in a thread of its own."""
        # A process that has ended is noticed where its tokens are read.
        with contextlib.suppress(OSError):
            key = 0
            while (job := queue.take(wait=True)) is not None:
                prompt = job.prompt
                tiles = prompt.tiles
                begin = _Begin(
                    key=key,
                    input_ids=prompt.input_ids,
                    begun=prompt.begun,
                    shape=None if tiles is None else tuple(tiles.shape),
                    dtype=torch.uint8 if tiles is None else tiles.dtype,
                    settings=job.settings,
                    top_logprobs=job.top_logprobs,
                    adapter=job.adapter,
                    since_s=job.since_s,
                )
                self._send(begin, job)
                # They are there now: many megabytes of memory here.
                job.prompt = replace(prompt, tiles=None)
                key += 1
            self._send(None)

    def _send(self, message: Any, begun: Job | None = None) -> None:
        with self._writing:
            if begun is not None:
                # Not sooner: cancelled by then, it would be cancelled there before it has come.
                self._jobs[message.key] = begun
            self._pipe.send(message)
            if begun is not None and begun.prompt.tiles is not None:
                left = _bytes_of(begun.prompt.tiles.contiguous())
                # Python's lock is free meanwhile; pickling would copy them under it.
                while left:
                    left = left[os.write(self._pipe.fileno(), left) :]


_LONGEST_END_S = 10
"""How long a process that was told to end may take."""
_SAID = (UserError, OSError, MemoryError, ImportError, RuntimeError)
"""Failures of an engine that the server says; torch's out-of-memory error is a RuntimeError."""


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data.cast("B")


def _work(load: Callable[[], Answering], pipe: Connection, level: int) -> None:
    """Runs an engine; the whole life of its process."""
    # A signal for the whole group is for the server, which answers what is under way first.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    log.setup(level)
    end_with_parent()
    queue: JobQueue[Job] = JobQueue()
    try:
        answering: Any = load()
        pipe.send(answering.served)
        on_gpu = torch.cuda.is_initialized()
        reader = threading.Thread(target=_read, args=(pipe, queue, on_gpu), daemon=True)
        reader.start()
        outbox = _Outbox(queue, pipe)
        answering.run(outbox, outbox.tell)
        outbox.flush()
        last = None
    except _SAID as error:
        if not isinstance(error, UserError):
            log.get_logger().exception("the engine's process failed")
        # Its text alone: not every exception can be pickled.
        last = RunError(explain(error))
    # The server may have ended, and with it this process.
    with contextlib.suppress(OSError):
        pipe.send(last)


def end_with_parent() -> None:
    """Lets this process end as soon as the one that began it has, however that ended."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def _read(pipe: Connection, queue: JobQueue[Job], on_gpu: bool) -> None:
    """Puts jobs into the queue as they come; runs in a thread of its own."""
    try:
        _read_all(pipe, queue, on_gpu)
    except (EOFError, OSError):
        pass  # the server has ended, and this process will
    finally:
        # Also after an error: the engine would wait for jobs for ever, and the server for answers.
        queue.close()


def _read_all(pipe: Connection, queue: JobQueue[Job], on_gpu: bool) -> NoReturn:
    jobs: dict[int, Job] = {}
    while True:
        message = pipe.recv()
        if message is None:
            # What is under way may still be cancelled, as by a server whose drain is over.
            queue.close()
            continue
        if isinstance(message, int):
            # Cancelled before it had ended here, or after.
            if message in jobs:
                jobs[message].cancelled = True
            continue
        tiles = None
        if message.shape is not None:
            # Pinned: a GPU copies from it while the host goes on.
            tiles = torch.empty(message.shape, dtype=message.dtype, pin_memory=on_gpu)
            left = _bytes_of(tiles)
            while left:
                count = os.readv(pipe.fileno(), [left])
                if not count:
                    raise EOFError
                left = left[count:]
        prompt = Prompt(message.input_ids, tiles, message.begun)
        job = Job(message.key, prompt, message.settings, since_s=message.since_s)
        job.top_logprobs, job.adapter = message.top_logprobs, message.adapter
        jobs = {key: other for key, other in jobs.items() if not other.ended}
        jobs[message.key] = job
        queue.put(job)


class _Outbox:
    """Collects what jobs have more, and sends it once a step; a `Source` of the jobs as well."""

    def __init__(self, queue: JobQueue[Job], pipe: Connection) -> None:
        self._queue = queue
        self._pipe = pipe
        self._news: dict[Any, _News] = {}
        """Of jobs that have more, by their keys."""
        self._sent: dict[Any, tuple[int, int]] = {}
        """Tokens and log-probabilities of each job that are sent, or in the news."""

    def take(self, *, wait: bool) -> Job | None:
        """Returns the next job; see `Source`. The scheduler asks between two steps."""
        self.flush()
        return self._queue.take(wait=wait)

    def tell(self, job: Job) -> None:
        """Notes what a job has more."""
        # Again, so that a step has passed without a question for jobs: all slots are taken.
        if job.key in self._news:
            self.flush()
        # Now, not when it is sent: the next step may have changed it by then.
        tokens, listed = self._sent.pop(job.key, (0, 0))
        news = _News(job.key, job.generated[tokens:], job.logprobs[listed:], job.ended)
        self._news[job.key] = news
        if not job.ended:
            self._sent[job.key] = len(job.generated), len(job.logprobs)

    def flush(self) -> None:
        """Sends what jobs have more."""
        if self._news:
            self._pipe.send([*self._news.values()])
            self._news.clear()
