"""Says why a run does not get on: which rank the others wait for, and every rank's stacks.

A thread in each rank writes what the rank does to RUN/watchdog, every few seconds. Once no rank has
made progress for `watchdog_s`, each adds the stacks of its threads and loader workers, and rank 0
logs what the ranks do. Nothing is ended here: collectives have time-outs of their own.
"""

import faulthandler
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

from pydantic import TypeAdapter, ValidationError

from internvl import dist, log
from internvl.data import workers
from internvl.errors import counted
from internvl.launch import launchers

FOLDER, TRACES = "watchdog", "nccl-"
"""Folder in a run folder, and the start of the names of NCCL's files there."""
_TICK_SHARE, _LEAST_TICK_S, _MOST_TICK_S = 0.1, 0.05, 15.0
_STARTING = 3.0
"""Models load and compile before the first step, which takes longer than any other."""
_NAMED = 4  # ranks in a sentence


@dataclass
class Status:
    """What a rank does at the moment."""

    rank: int = 0
    host: str = ""
    pid: int = 0
    written_s: float = 0.0
    progress_s: float = 0.0
    """Time of its last progress, as all times in seconds since 1970."""
    step: int = 0
    """Step that it works at; 0 before the first."""
    phase: str = "starts"
    rows: list[str] = field(default_factory=list)
    """First samples of the rows in work."""
    reads: str = ""
    """Samples that it waits for."""
    reads_s: float | None = None
    """Time since which it waits for them."""
    collectives: int = 0
    """Collectives that it has passed."""
    waits_for_ranks: bool = False

    def describe(self, now_s: float) -> str:
        """Returns rank, host and what it does, such as "rank 1 on node7 trains step 12 (…)"."""
        doing = f"{self.phase} step {self.step}" if self.step else self.phase
        if self.waits_for_ranks:
            doing += " and waits for other ranks"
        if self.reads_s is not None:
            doing += f", and waits for {self.reads} for {now_s - self.reads_s:.0f} s"
        elif self.rows:
            doing += f" (rows of {', '.join(self.rows)})"
        return f"rank {self.rank} on {self.host} {doing}"


_STATUS: TypeAdapter[Status] = TypeAdapter(Status)
_current = Status()


def beat(phase: str, step: int | None = None, rows: Sequence[str] = ()) -> None:
    """Notes progress of this process.

    Args:
        phase: verb in the present, such as "trains".
        step: step that is worked at; by default as before.
        rows: names of the first sample of each row.
    """
    _current.phase = phase
    _current.rows = list(rows[:_NAMED])
    _current.progress_s = time.time()
    if step is not None:
        _current.step = step


@contextmanager
def watching(folder: Path, limit_s: float) -> Iterator[None]:
    """Context in which a thread watches this rank of the run in `folder`; 0 s: none does."""
    if not limit_s:
        yield
        return
    _current.step = 0
    beat("starts")
    watchdog = Watchdog(folder / FOLDER, limit_s)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.stop()


class Watchdog:
    """The thread, the rank's file of stacks and its status for the other ranks."""

    def __init__(self, folder: Path, limit_s: float) -> None:
        self.folder = folder
        self.limit_s = limit_s
        self.tick_s = min(max(_LEAST_TICK_S, _TICK_SHARE * limit_s), _MOST_TICK_S)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="internvl-watchdog", daemon=True)
        self._stacks: TextIO | None = None
        self._reported_s = 0.0

    def start(self) -> None:
        """Opens the file for stacks and starts the thread."""
        # A full or read-only disk costs the report, not the run.
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file("json").unlink(missing_ok=True)
            # Appended: a restart must not remove what tells why it was needed.
            self._stacks = self.file("stacks").open("a")
            # Now: loader workers, which are forked later, inherit it.
            faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and removes the files, unless they tell of a stall."""
        self._stopped.set()
        self._thread.join()
        if self._stacks is not None:
            if dist.world_size() > 1:
                faulthandler.cancel_dump_traceback_later()
            faulthandler.unregister(signal.SIGUSR2)
            is_empty = not self._stacks.tell()
            self._stacks.close()
            with suppress(OSError):
                self.file("json").unlink(missing_ok=True)
                if is_empty:
                    self.file("stacks").unlink()
                self.folder.rmdir()

    def file(self, suffix: str, rank: int | None = None) -> Path:
        """Returns a file of a rank, by default this one."""
        return self.folder / f"rank-{dist.rank() if rank is None else rank:05d}.{suffix}"

    def _run(self) -> None:
        while not self._stopped.wait(self.tick_s):
            self._arm()
            # Of the day, not monotonic: ranks on other hosts compare it with their own.
            now_s = time.time()
            status = self._write_status(now_s)
            newest_s = max(other.progress_s for other in [status, *self._read_others()])
            # Any rank's: the others may wait for long while one evaluates or compiles.
            limit_s = self.limit_s if _current.step > 1 else _STARTING * self.limit_s
            if now_s - newest_s < limit_s:
                continue
            # Once a stall: the next report needs progress in between.
            if newest_s > self._reported_s:
                self._reported_s = newest_s
                self._dump(status, now_s)
                if dist.is_main():
                    # The others write what they do at that moment too.
                    self._stopped.wait(2 * self.tick_s)
                    self._report(now_s - newest_s)

    def _arm(self) -> None:
        """Has stacks written without this thread, which cannot run if C code keeps the GIL."""
        # The process has one such timer, which a program of a single process may use itself.
        if self._stacks is not None and dist.world_size() > 1:
            faulthandler.dump_traceback_later(2 * _STARTING * self.limit_s, file=self._stacks)

    def _write_status(self, now_s: float) -> Status:
        _current.rank, _current.host, _current.pid = dist.rank(), launchers.host(), os.getpid()
        _current.written_s = now_s
        _current.progress_s = max(_current.progress_s, log.Progress.updated_s)
        _current.reads, _current.reads_s = workers.waited_for() or ("", None)
        _current.collectives = dist.waiting.done
        _current.waits_for_ranks = dist.waiting.is_inside
        # By files, which need no rank to answer: the main thread of any may hang.
        if dist.world_size() > 1:
            with suppress(OSError):
                self.file("json").write_text(json.dumps(asdict(_current)), encoding="utf-8")
        return _current

    def _read_others(self) -> list[Status]:
        statuses = []
        for rank in set(range(dist.world_size())) - {dist.rank()}:
            # Not there yet, or half written.
            with suppress(OSError, ValidationError):
                text = self.file("json", rank).read_text(encoding="utf-8")
                statuses.append(_STATUS.validate_json(text))
        return statuses

    def _dump(self, status: Status, now_s: float) -> None:
        """Appends the stacks of this rank's threads and of its loader workers to its file."""
        if self._stacks is None:
            return
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now_s))
        with suppress(OSError):
            line = f"{when}: {status.describe(now_s)} (process {status.pid})\n"
            self._stacks.write(line)
            self._stacks.flush()
            faulthandler.dump_traceback(self._stacks, all_threads=True)
            for pid in workers.reader_pids():
                os.kill(pid, signal.SIGUSR2)

    def _report(self, stalled_s: float) -> None:
        """Logs which rank the others wait for, and what all do."""
        now_s = time.time()
        status = self._write_status(now_s)
        statuses = sorted([status, *self._read_others()], key=lambda other: other.rank)
        lines = [
            f"no progress for {stalled_s:.0f} s. {self._blame(statuses, now_s)} "
            f"Stacks of every rank are in {self.folder}",
            *(other.describe(now_s) for other in statuses[: 2 * _NAMED]),
        ]
        if len(statuses) > 2 * _NAMED:
            lines.append(f"and {counted(len(statuses) - 2 * _NAMED, 'more rank')}")
        text = "\n  ".join(lines)
        log.get_logger().warning("%s", text)
        with suppress(OSError):
            (self.folder / "report.txt").write_text(text + "\n", encoding="utf-8")

    def _blame(self, statuses: Sequence[Status], now_s: float) -> str:
        """Returns a sentence about the ranks that hold up the others; "" with a single rank."""
        ranks = dist.world_size()
        if ranks == 1:
            return ""
        alive = {status.rank for status in statuses if now_s - status.written_s < self.limit_s}
        missing = sorted(set(range(ranks)) - alive)
        # A rank that cannot even write its status is dead, or its host is.
        if missing:
            return f"Nothing is heard of rank {', '.join(map(str, missing[:_NAMED]))}."
        # A read that all wait for comes before what they wait in.
        slow = [s.rank for s in statuses if s.reads_s and now_s - s.reads_s > self.limit_s / 2]
        if not slow:
            least = min(status.collectives for status in statuses)
            behind = [status for status in statuses if status.collectives == least]
            slow = [status.rank for status in behind if not status.waits_for_ranks]
        if not slow or len(slow) == ranks:
            return "All ranks are at the same point."
        return f"The others wait for rank {', '.join(map(str, slow[:_NAMED]))}."
