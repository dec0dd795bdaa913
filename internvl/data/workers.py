"""Worker processes that read data, and what becomes of their errors.

A `torch.utils.data.DataLoader` gives an exception of a worker as a text with a traceback in it, and
says of a worker that was killed only that it is gone. Here an exception arrives as it was raised,
with the sample that it is about, and a death is one sentence: the signal, what it most likely
means, what to lower, and the samples that the worker had in hand.
"""

import multiprocessing
import pickle
import re
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from internvl.data.sampler import UnitRef
from internvl.data.sources import Source
from internvl.errors import DataError, WorkerDied

Job = TypeVar("Job")

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
    r"(?:is killed by signal: (?P<how>[^.]*)|exited unexpectedly)"
)
_SHARED_MEMORY = re.compile(r"shared memory|</torch_\d+")  # torch's own words
_NAMED = 3  # groups of samples in a sentence


class _Failed:
    """An exception of a worker on its way to the main process, its traceback as a note."""

    def __init__(self, error: Exception) -> None:
        error.add_note("".join(traceback.format_exception(error)))
        try:
            pickle.loads(pickle.dumps(error))
            self.error = error
        except Exception:  # noqa: BLE001 (a foreign exception may do anything when it is pickled)
            self.error = RuntimeError(f"{type(error).__name__}: {error}")
            self.error.__notes__ = error.__notes__


class _Named(Dataset[Any], Generic[Job]):
    """A reader whose exceptions carry the sample that they are about."""

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


class Reading(Generic[Job]):
    """What `reader` makes of every job, in order; worker processes read ahead.

    Args:
        name: says which sample of a job an exception is about.
        describe: names a job in a few words, for a worker that died over it.
        workers: processes; 0 reads in this one.
        ahead: jobs that a worker is ahead.
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
        """Numbered jobs that are handed out and not back yet."""
        self.processes: list[BaseProcess] = []
        self.loader = DataLoader(
            _Named(reader, name),
            sampler=self._handed_out(jobs),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=ahead if workers else None,
            # Its own: a loader draws a seed when it starts, which would shift dropout after a
            # resume.
            generator=torch.Generator(),
        )

    def _handed_out(self, jobs: Iterator[Job]) -> Iterator[Job]:
        for numbered in enumerate(jobs):
            self.issued.append(numbered)
            yield numbered[1]

    def __iter__(self) -> Iterator[Any]:
        """Raises:
        WorkerDied: a worker was killed or crashed.
        DataError: there is no shared memory or no open file left for a worker's result.
        """
        others = set(multiprocessing.active_children())
        with self.named_deaths():
            # In a thread, because in the main one torch would set a signal handler that raises at
            # whatever line a death finds the program; so it is noticed here, within five seconds.
            with ThreadPoolExecutor(1) as thread:
                results = thread.submit(iter, self.loader).result()
            self.processes = [p for p in multiprocessing.active_children() if p not in others]
            for result in results:
                if isinstance(result, _Failed):
                    raise _as_sentence(result.error) or result.error
                self.issued.popleft()
                yield result

    @contextmanager
    def named_deaths(self) -> Iterator[None]:
        """Inside, a worker's death is a sentence. Where other code has used a loader of torch's,
        any line of the main thread may be where it is noticed, by the signal handler of that."""
        try:
            yield
        except RuntimeError as error:
            sentence = self._death(error) or _as_sentence(error)
            if sentence is None:
                raise
            raise sentence from None

    def _death(self, error: RuntimeError) -> WorkerDied | None:
        known = _DIED.search(str(error))
        if known is None:
            return None
        pids = {int(pid) for pid in known["pids"].split(",")}
        dead = [(n, p) for n, p in enumerate(self.processes) if p.pid in pids]
        for _, process in dead:
            process.join(timeout=1)  # so that its exit code is known
        # One that dies at once does so before the others have started, and is not known yet.
        number, code = (dead[0][0], dead[0][1].exitcode) if dead else (None, None)
        self._end_others()
        return WorkerDied(death_sentence(min(pids), code, known["how"], self._in_hand(number)))

    def _end_others(self) -> None:
        """Torch would wait five seconds for workers that wait for what the dead one had locked."""
        with suppress(RuntimeError):  # torch's handler may see these deaths too
            for process in self.processes:
                process.terminate()
            for process in self.processes:
                process.join(timeout=1)

    def _in_hand(self, worker: int | None) -> str:
        """The jobs that a worker has: torch hands them out in turn; None: those of all workers."""
        held = [job for n, job in self.issued if worker in (None, n % max(1, self.num_workers))]
        return "; ".join(map(self.describe, held[:_NAMED]))


def death_sentence(pid: int, code: int | None, how: str | None = None, in_hand: str = "") -> str:
    """What to say of a worker process that is gone.

    Args:
        code: as of `multiprocessing.Process.exitcode`, minus the number of a signal; None: unknown.
        how: torch's word for the signal, such as "Killed".
        in_hand: the samples that it had not handed over.
    """
    number = -code if code is not None and code < 0 else _number_of(how)
    had = f"; it was reading {in_hand}" if in_hand else ""
    who = f"a process that reads data (loader worker, pid {pid})"
    if number is None:
        ended = "ended" if code is None else f"ended with exit code {code}"
        meaning = f"if the machine's memory ran out, {_LESS_MEMORY}"
        return f"{who} {ended}{had}; {meaning}"
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "unknown"
    meaning = _MEANINGS.get(number, _CRASH)  # type: ignore[call-overload]
    return f"{who} was killed by signal {number} ({name}){had}; {meaning}"


def _number_of(how: str | None) -> int | None:
    """The signal that the C library describes by this word."""
    words = {signal.strsignal(number): int(number) for number in signal.valid_signals()}
    return words.get((how or "").strip())


def _as_sentence(error: Exception) -> DataError | None:
    """What a lack of shared memory or of open files means, or None for anything else."""
    text = str(error)
    if not isinstance(error, RuntimeError | OSError):
        return None
    if "oo many open files" in text:
        remedy = "raise the limit (ulimit -n 65536) or lower data.workers"
        return DataError(f"too many files are open at once; {remedy}")
    if _SHARED_MEMORY.search(text):
        what = "shared memory is full, in which loader workers hand images over"
        return DataError(f"{what}; {_LARGER_SHM}")
    return None


def explain(error: BaseException) -> str | None:
    """The sentence for an error of torch's loader that comes from elsewhere, or None."""
    known = _DIED.search(str(error))
    if known is None:
        return None
    return death_sentence(int(known["pids"].split(",")[0]), None, known["how"])


def describe_refs(files: Sequence[Source], refs: Sequence[UnitRef]) -> str:
    """Where some units stand: "data/train.jsonl lines 4 to 11"."""
    by_file: dict[int, list[int]] = {}
    for ref in refs:
        by_file.setdefault(ref.file, []).extend(line + 1 for line in ref.lines)
    parts = []
    for number, lines in by_file.items():
        shown = sorted(lines)
        whole = len(shown) > 1 and shown[-1] - shown[0] + 1 == len(shown)
        listed = f"{shown[0]} to {shown[-1]}" if whole else ", ".join(map(str, shown))
        word = "line" if len(shown) == 1 else "lines"
        parts.append(f"{files[number].config.annotations} {word} {listed}")
    return " and ".join(parts)


def name_failing(
    reader: Any, files: Sequence[Source], refs: Sequence[UnitRef], error: Exception
) -> str:
    """The sample that `reader` fails at, found by reading each alone; else all of them."""
    for ref in refs:
        for number, line in enumerate(ref.lines):
            one = replace(ref, lines=(line,), row=ref.row + number)
            try:
                reader[one]
            except type(error):
                return describe_refs(files, [one])
            except Exception:  # noqa: BLE001 (another one; what is looked for is the first)
                continue
    return describe_refs(files, refs)
