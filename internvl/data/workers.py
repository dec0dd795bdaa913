"""Worker processes that read data, with errors that name the sample.

`torch.utils.data.DataLoader` turns an exception of a worker into a text with a traceback, and of a
killed worker it only says that it is gone. Here an exception arrives as it was raised, with a note
that names the sample; a death becomes one sentence: signal, likely cause, remedy, and the samples
that the worker was reading.
"""

import gc
import multiprocessing
import os
import pickle
import re
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from internvl import dist, log
from internvl.data.sampler import UnitRef
from internvl.data.sources import Source
from internvl.errors import DataError, WorkerDied, counted

Job = TypeVar("Job")

START_METHOD: str | None = "fork" if sys.platform == "linux" else None
"""How workers begin: a forked one has at once what this process has read, and its closures.

Asked for, since Python's default is another one in a process that was itself spawned, and
everywhere from 3.14 on. None: that default, where system libraries do not survive a fork (macOS);
it pickles what workers read with.
"""

_LESS_MEMORY = (
    "lower data.workers (0 reads in the main process), data.tiles.max or global_batch, or give the "
    "machine more memory"
)
_LARGER_SHM = "make /dev/shm larger (docker run --shm-size=8g, or --ipc=host) or lower data.workers"
_MEANINGS = {
    signal.SIGKILL: f"most likely the machine's memory ran out: {_LESS_MEMORY}",
    signal.SIGBUS: "most likely shared memory is full, or a file that it reads was cut short "
    f"meanwhile: {_LARGER_SHM}",
    signal.SIGTERM: "somebody or a job scheduler stopped it: start the same command again",
}
_CRASH = (
    "a decoder or another library crashed, most likely over a damaged file: remove the file from "
    "the annotations; `internvl check` with data.workers=1 shows which one"
)
_DIED = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? (?P<pids>[\d, ]+)\) "
    r"(?:is killed by signal: (?P<signal>[^.]*)|exited unexpectedly)"
)
_SHARED_MEMORY = re.compile(r"shared memory|</torch_\d+")  # torch's own words
_DYING_S = 1.0
_NAMED = 3  # groups of samples in a sentence


class _Failed:
    """Carries an exception from a worker to the main process, its traceback as a note."""

    def __init__(self, error: Exception) -> None:
        error.add_note("".join(traceback.format_exception(error)))
        try:
            # Both ways: some exceptions pickle and fail when they are read.
            pickle.loads(pickle.dumps(error))
            self.error = error
        except Exception:  # noqa: BLE001 (a foreign exception may do anything when it is pickled)
            self.error = RuntimeError(f"{type(error).__name__}: {error}")
            self.error.__notes__ = error.__notes__


class _Named(Dataset[Any], Generic[Job]):
    """Wraps a reader so that its exceptions name the sample."""

    def __init__(self, reader: Dataset[Any], name: Callable[[Job, Exception], str]) -> None:
        self.reader = reader
        self.name = name

    def __getitem__(self, job: Job) -> Any:
        try:
            return self.reader[job]
        except Exception as error:
            error.add_note(f"while reading {self.name(job, error)}")
            if get_worker_info() is None:
                raise
            return _Failed(error)


@contextmanager
def _frozen_garbage() -> Iterator[None]:
    """Keeps processes that are forked inside from collecting the garbage of this one."""
    # A decoded video frame holds a scaler with threads. Threads do not survive a fork, and the
    # child that frees the scaler waits for them forever.
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _heed_parent_alone(worker: int) -> None:
    """Has this loader worker end at its parent's SIGTERM and at no other one."""
    # A scheduler sends it to every process of a job; the run then finishes its step, with data.
    if not hasattr(signal, "sigwaitinfo"):  # not on macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Thread(target=_await_parents_signal, args=(os.getppid(),), daemon=True).start()


def _await_parents_signal(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


class _Loader(DataLoader[Any]):
    """A DataLoader that leaves the word about too many workers to `warn_of_idle_workers`."""

    def check_worker_number_rationality(self) -> None:
        """Does nothing; torch's own warns of every loader, twice and in words of its code."""


def usable_cores() -> int:
    """Returns how many CPU cores this process may run on."""
    # macOS has no affinity.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def warn_of_idle_workers(workers: int) -> None:
    """Warns once per process of more workers than CPU cores, which read no faster."""
    cores = usable_cores()
    if workers > cores and dist.is_main():
        log.get_logger().warning(
            "data.workers = %d, but this process has %s: more workers than cores take memory and "
            "read no faster; lower data.workers to %d or less",
            workers,
            counted(cores, "CPU core"),
            cores,
        )


_readings: "WeakSet[Reading[Any]]" = WeakSet()


def waited_for() -> tuple[str, float] | None:
    """Returns the samples that this process waits for longest, and since when (seconds since
    1970)."""
    # A copy of names: another thread reads meanwhile.
    waits = [(reading.waiting_s, reading) for reading in list(_readings)]
    since = [(start_s, reading) for start_s, reading in waits if start_s is not None]
    if not since:
        return None
    start_s, reading = min(since, key=lambda wait: wait[0])
    jobs = list(reading.issued)
    return (reading.describe(jobs[0][1]) if jobs else "", start_s)


def reader_pids() -> list[int]:
    """Returns the processes that read data for this one."""
    processes = [process for reading in list(_readings) for process in reading.processes]
    return [p.pid for p in processes if p.pid is not None and p.exitcode is None]


class Reading(Generic[Job]):
    """Iterates over `reader[job]` in order; worker processes prefetch.

    Args:
        name: returns the sample of a job that an exception is about.
        describe: returns a short name of a job, for the message about a dead worker.
        workers: number of processes; 0 reads in this one.
        ahead: jobs that each worker prefetches.
    """

    def __init__(
        self,
        reader: Dataset[Any],
        jobs: Iterator[Job],
        *,
        name: Callable[[Job, Exception], str],
        describe: Callable[[Job], str],
        workers: int,
        ahead: int = 2,
    ) -> None:
        self.describe = describe
        self.num_workers = workers
        self.issued: deque[tuple[int, Job]] = deque()
        """(index, job) of the jobs that are sent to workers and not returned yet."""
        self.processes: list[BaseProcess] = []
        self.waiting_s: float | None = None
        """Time since which the next result is waited for, in seconds since 1970."""
        _readings.add(self)
        warn_of_idle_workers(workers)
        self.loader = _Loader(
            _Named(reader, name),
            sampler=self._issue(jobs),
            batch_size=None,
            num_workers=workers,
            multiprocessing_context=START_METHOD if workers else None,
            prefetch_factor=ahead if workers else None,
            worker_init_fn=_heed_parent_alone,
            # Its own: a loader draws a seed from the global one when it starts, which would shift
            # dropout after a resume.
            generator=torch.Generator(),
        )

    def _issue(self, jobs: Iterator[Job]) -> Iterator[Job]:
        for numbered in enumerate(jobs):
            self.issued.append(numbered)
            yield numbered[1]

    def __iter__(self) -> Generator[Any, None, None]:
        """Yields `reader[job]` of every job, in order.

        Raises:
            WorkerDied: a worker was killed or crashed.
            DataError: there is no shared memory or no open file left for a worker's result.
        """
        others = set(multiprocessing.active_children())
        with self.named_deaths():
            # In a thread: in the main one torch would install a SIGCHLD handler that raises at any
            # line of the program. Without it a death is noticed here, within five seconds.
            with ThreadPoolExecutor(1) as thread, _frozen_garbage():
                results = thread.submit(iter, self.loader).result()
            self.processes = [p for p in multiprocessing.active_children() if p not in others]
            try:
                self.waiting_s = time.time()
                for result in results:
                    self.waiting_s = None
                    if isinstance(result, _Failed):
                        raise _resource_error(result.error) or result.error
                    self.issued.popleft()
                    yield result
                    self.waiting_s = time.time()
            finally:
                self.waiting_s = None

    @contextmanager
    def named_deaths(self) -> Iterator[None]:
        """Turns a worker's death inside the block into WorkerDied.

        If other code used a DataLoader, its signal handler may raise at any line of the block.
        """
        try:
            yield
        except (RuntimeError, ConnectionError, EOFError) as error:
            sentence = self._death(error) or _resource_error(error)
            if sentence is None:
                raise
            raise sentence from None

    def _death(self, error: Exception) -> WorkerDied | None:
        match = _DIED.search(str(error))
        if match is not None:
            pids = {int(pid) for pid in match["pids"].split(",")}
            signal_name = match["signal"]
        elif isinstance(error, RuntimeError):
            return None
        else:
            # A result of the dead one is fetched from it, and so its socket breaks first.
            for process in self.processes:
                process.join(timeout=_DYING_S / len(self.processes))
            pids = {p.pid for p in self.processes if p.pid and p.exitcode is not None}
            signal_name = None
            if not pids:
                return None
        dead = [(n, p) for n, p in enumerate(self.processes) if p.pid in pids]
        for _, process in dead:
            process.join(timeout=1)  # its exit code is set by then
        # A worker that dies at once does so before `processes` is set.
        worker, code = (dead[0][0], dead[0][1].exitcode) if dead else (None, None)
        self._terminate_others()
        return WorkerDied(death_sentence(min(pids), code, signal_name, self._in_hand(worker)))

    def _terminate_others(self) -> None:
        """Terminates the workers that are left."""
        # torch would wait five seconds for those that block on a lock of the dead one.
        with suppress(RuntimeError):  # torch's handler may see these deaths too
            for process in self.processes:
                process.terminate()
            for process in self.processes:
                process.join(timeout=1)

    def _in_hand(self, worker: int | None) -> str:
        """Names the jobs that a worker is reading; None: those of all workers."""
        # torch hands jobs out in turn, so the index of a job tells its worker.
        held = [job for n, job in self.issued if worker in (None, n % max(1, self.num_workers))]
        return "; ".join(map(self.describe, held[:_NAMED]))


def death_sentence(
    pid: int, code: int | None, signal_name: str | None = None, in_hand: str = ""
) -> str:
    """Returns the message about a worker process that died.

    Args:
        code: `multiprocessing.Process.exitcode`, negative for a signal; None: unknown.
        signal_name: torch's description of the signal, such as "Killed".
        in_hand: the samples that it was reading.
    """
    signal_number = -code if code is not None and code < 0 else _signal_number(signal_name)
    had = f"; it was reading {in_hand}" if in_hand else ""
    worker = f"a process that reads data (loader worker, pid {pid})"
    if signal_number is None:
        ended = "ended" if code is None else f"ended with exit code {code}"
        meaning = f"if the machine's memory ran out, {_LESS_MEMORY}"
        return f"{worker} {ended}{had}; {meaning}"
    try:
        name = signal.Signals(signal_number).name
    except ValueError:
        name = "unknown"
    meaning = _MEANINGS.get(signal_number, _CRASH)  # type: ignore[call-overload]
    return f"{worker} was killed by signal {signal_number} ({name}){had}; {meaning}"


def _signal_number(description: str | None) -> int | None:
    """Returns the signal that the C library describes by these words."""
    words = {signal.strsignal(s): int(s) for s in signal.valid_signals()}
    return words.get((description or "").strip())


def _resource_error(error: Exception) -> DataError | None:
    """Returns the DataError for exhausted shared memory or open files, None for other errors."""
    text = str(error)
    if not isinstance(error, RuntimeError | OSError):
        return None
    if "oo many open files" in text:
        remedy = "raise the limit (ulimit -n 65536) or lower data.workers"
        return DataError(f"too many files are open at once; {remedy}")
    if _SHARED_MEMORY.search(text):
        reason = "shared memory is full, in which loader workers hand images over"
        return DataError(f"{reason}; {_LARGER_SHM}")
    return None


def explain(error: BaseException) -> str | None:
    """Returns the message for a worker's death that another loader raised, else None."""
    match = _DIED.search(str(error))
    if match is None:
        return None
    return death_sentence(int(match["pids"].split(",")[0]), None, match["signal"])


def describe_refs(files: Sequence[Source], refs: Sequence[UnitRef]) -> str:
    """Returns the places of units, such as "data/train.jsonl lines 4 to 11"."""
    by_file: dict[int, list[int]] = {}
    for ref in refs:
        by_file.setdefault(ref.file, []).extend(line + 1 for line in ref.lines)
    places = []
    for file_index, lines in by_file.items():
        shown = sorted(lines)
        whole = len(shown) > 1 and shown[-1] - shown[0] + 1 == len(shown)
        listed = f"{shown[0]} to {shown[-1]}" if whole else ", ".join(map(str, shown))
        word = "line" if len(shown) == 1 else "lines"
        places.append(f"{files[file_index].config.annotations} {word} {listed}")
    return " and ".join(places)


def name_failing(
    reader: Any, files: Sequence[Source], refs: Sequence[UnitRef], error: Exception
) -> str:
    """Returns the sample that `reader` fails at, by reading each alone; else all of them."""
    for ref in refs:
        for offset, line in enumerate(ref.lines):
            single = replace(ref, lines=(line,), row=ref.row + offset)
            try:
                reader[single]
            except type(error):
                return describe_refs(files, [single])
            except Exception:  # noqa: BLE001 (another one; what is looked for is the first)
                continue
    return describe_refs(files, refs)
