"""Log lines, a run's log file, progress, JSONL files, TensorBoard. Imports no torch.

The package logs to the logger "internvl" and is silent until `setup` is called, which the command
line does; a program that imports the package keeps its own logging.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from internvl.errors import UserError, explain
from internvl.files import names_file, write_text

Row = Mapping[str, float | int | str | list[str]]

_BAR_DELAY_S = 2.0
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def get_logger() -> logging.Logger:
    """Returns the package's one logger."""
    return logging.getLogger("internvl")


class _StderrHandler(logging.Handler):
    """Writes to standard error as it is at that moment, around a progress bar if one is shown."""

    # Not logging.StreamHandler, which keeps the stream of its start: tests replace stderr later.
    def emit(self, record: logging.LogRecord) -> None:
        # A line of progress, for the log file: a bar shows it here already.
        if getattr(record, "in_bar", False):
            return
        with tqdm.external_write_mode(file=sys.stderr):
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()


def setup(level: int = logging.INFO, *, rank: int = 0) -> None:
    """Send the package's log lines to standard error. A second call replaces the first.

    Args:
        level: Least severe level that is shown.
        rank: Rank of this process; ranks above 0 show warnings and worse only, with their number.
    """
    handler = _StderrHandler()
    who = f"[rank {rank}] " if rank else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(message)s", datefmt="%H:%M:%S"))
    logger = get_logger()
    # Replaced, not added: a second call would print every line twice.
    logger.handlers = [handler]
    logger.setLevel(max(level, logging.WARNING) if rank else level)
    logger.propagate = False  # a root handler of the calling program would print it again
    # transformers imports an installed torchao, which warns in every process of the GPU libraries
    # that this machine cannot load, and of its own use of torch. The third warns of operations in
    # place wherever a compiled block is recomputed; no block has any.
    for name in ("torchao", "torch.utils._pytree", "torch._higher_order_ops.wrap"):
        logging.getLogger(name).setLevel(logging.ERROR)


class _FileHandler(logging.Handler):
    """Appends log lines with date and time to a text file; on a full disk they wait for space."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.INFO)
        self.path = path
        self.pending: list[str] = []
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        self.pending.append(self.format(record) + "\n")
        # A line of the log is no reason to end a run of days.
        with suppress(OSError):
            self.write()

    def write(self) -> None:
        """Writes the lines that wait. Raises OSError, which names the file."""
        text = "".join(self.pending)
        _append(self.path, text, errors="backslashreplace")
        self.pending.clear()


def _append(path: Path, text: str, *, errors: str = "strict") -> None:
    """Appends text to a file, all of it or nothing.

    Raises:
        OSError: it could not be written (disk full, …); the error names `path`.
    """
    data = text.encode("utf-8", errors)
    # Opened each time: truncate_after may have replaced the file. Without a buffer, which would be
    # written once more when the file is closed.
    with names_file(path), path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            # Half a line would stand in the middle once there is space again.
            with suppress(OSError):
                os.truncate(path, size)
            raise


class _Relay(logging.Handler):
    """Passes records on as a logger did before its level was lowered."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger.getEffectiveLevel())
        self.handlers = list(logger.handlers)
        self.parent = logger.parent if logger.propagate else None

    def emit(self, record: logging.LogRecord) -> None:
        for handler in self.handlers:
            if record.levelno >= handler.level:
                handler.handle(record)
        if self.parent is not None:
            self.parent.callHandlers(record)


@contextmanager
def also_to(path: Path) -> Iterator[None]:
    """Appends log lines of INFO and above to a file, and the sentence of an error that ends it.

    What the calling program shows stays as it is: a program without logging is silent.

    Raises:
        OSError: at the end there are lines that could not be written (disk full, …); the error
            names `path`.
    """
    logger, handler = get_logger(), _FileHandler(path)
    before = logger.handlers, logger.level, logger.propagate
    # Records below the logger's level reach no handler, so the level goes down for the file's sake.
    if logger.isEnabledFor(logging.INFO):
        logger.handlers = [*logger.handlers, handler]
    else:
        logger.handlers, logger.propagate = [_Relay(logger), handler], False
        logger.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        sentence = explain(error) if isinstance(error, Exception) else type(error).__name__
        # On a full disk the error itself is what counts.
        with suppress(OSError):
            handler.handle(logger.makeRecord("internvl", logging.ERROR, "", 0, sentence, (), None))
        raise
    else:
        if handler.pending:
            handler.write()
    finally:
        logger.handlers, level, logger.propagate = before
        logger.setLevel(level)


class Progress:
    """How far a piece of work is: a bar on a terminal, else a log line every `every_s` seconds.

    Shown only where INFO lines of the package are, and a bar only after two seconds. Beside a bar
    the lines go to a log file, if there is one.

    >>> with Progress("images", total=3) as progress:
    ...     for image in range(3):
    ...         progress.update()
    """

    updated_s = 0.0
    """Time of the last update in this process, of any progress, in seconds since 1970."""

    def __init__(
        self, unit: str, *, total: int | None = None, done: int = 0, every_s: float = 30.0
    ) -> None:
        """
        Args:
            unit: What is counted, in the plural, such as "images".
            total: How many there will be; None when nobody knows.
            done: How many were done before, which do not count for the speed.
            every_s: Seconds between two lines.
        """
        self.unit = unit
        self.total = total
        self.done = self._start = done
        self._note = ""
        self._every_s = every_s
        # Monotonic: the clock of the day jumps when it is set.
        self._start_s = self._line_s = time.monotonic()
        self._line_done = done
        self._bar = (
            tqdm(
                total=total,
                initial=done,
                # Text with the time left first: a narrow terminal cuts the end off.
                bar_format="{desc}" if total is None else "|{bar:10}| {desc}",
                delay=_BAR_DELAY_S,
                leave=False,
                dynamic_ncols=True,
                file=sys.stderr,
            )
            if _shows_bars()
            else None
        )

    def update(self, count: int = 1, note: str = "") -> None:
        """`count` more are done.

        Args:
            note: Text about them, shown instead of the speed. The first and the last such note are
                lines, however fast they come.
        """
        Progress.updated_s = time.time()
        first = bool(note) and not self._note
        self.done, self._note = self.done + count, note
        now_s = time.monotonic()
        if self._bar is not None:
            text = self.line(now_s - self._start_s, short=True)
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(count)
        if note and self.done == self.total:
            # Now, not when it closes: what follows the last step may take long.
            self._log(now_s)
        elif first or now_s - self._line_s >= self._every_s:
            self._log(now_s, in_bar=self._bar is not None)

    def line(self, elapsed_s: float, *, short: bool = False) -> str:
        """One line: done, share, the time left if the total is known, and speed or note.

        Args:
            short: Without the share, which a bar shows.
        """
        rate = (self.done - self._start) / max(elapsed_s, 1e-9)  # a coarse clock shows no time
        about = self._note or (speed(rate, self.unit) if rate else "")
        if self.total is None:
            counts = [f"{self.done:,} {self.unit}"]
        elif short:
            counts = [f"{self.done:,}/{self.total:,} {self.unit}"]
        else:
            share = self.done / max(self.total, 1)
            counts = [f"{self.done:,} of {self.total:,} {self.unit} ({share:.0%})"]
        if self.total is not None:
            counts.append(self._time(elapsed_s, rate))
        return ", ".join(filter(None, [*counts, about]))

    def _time(self, elapsed_s: float, rate: float) -> str:
        assert self.total is not None
        if self.done >= self.total:
            return f"took {tqdm.format_interval(elapsed_s)}"
        return f"{tqdm.format_interval((self.total - self.done) / rate) if rate else '?'} left"

    def close(self) -> None:
        """Take the bar away; the last note stays as a line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._note and self._line_done != self.done:
            self._log(time.monotonic())

    def _log(self, now_s: float, *, in_bar: bool = False) -> None:
        self._line_s, self._line_done = now_s, -1 if in_bar else self.done
        get_logger().info("%s", self.line(now_s - self._start_s), extra={"in_bar": in_bar})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _shows_bars() -> bool:
    """True if `setup` shows INFO lines on standard error, and that is a terminal."""
    logger = get_logger()
    mine = [h for h in logger.handlers if isinstance(h, _StderrHandler)]
    return bool(mine) and logger.isEnabledFor(logging.INFO) and sys.stderr.isatty()


def speed(rate: float, unit: str) -> str:
    """Formats a speed in units per second: "5.0 images/s", or "12.0 s/image" if slow.

    Args:
        unit: plural, such as "images" or "images looked for".
    """
    noun = unit.split()[0]
    if 0 < rate < 1:
        return f"{1 / rate:,.1f} s/{noun.removesuffix('s')}"
    return f"{rate:,.{1 if rate < 100 else 0}f} {noun}/s"


class StepLog:
    """A JSONL file of a run folder, such as metrics.jsonl: an object with a "step" on each line.

    JSON knows no NaN or infinity: such a number stands as the string "NaN", "Infinity" or
    "-Infinity", so that every line stays valid JSON; `rows` turns them into numbers again.
    """

    _REMEDY = "remove this line, or move the file away; training needs none of it"

    def __init__(self, folder: Path, name: str) -> None:
        """The file `name` appears with the first row; `folder` is made if missing."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / name

    def append(self, row: Row) -> None:
        """Add one row, on disk as far as the operating system goes when this returns.

        Raises:
            OSError: The row could not be written (disk full, …); the error names the file.
        """
        assert "step" in row, f"a row without a step: {row}"
        _append(self.path, _line(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All rows, oldest first. A last line cut short by a crash is left out.

        Raises:
            UserError: Any other line is no object with a step; names file and line.
        """
        if not self.path.exists():
            return []
        try:
            # By "\n" alone: splitlines() also breaks at U+2028, which JSON leaves in strings.
            lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
        except OSError as error:
            raise UserError(f"cannot read {self.path} ({error.strerror}); {self._REMEDY}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} is not UTF-8 ({error.reason}); {self._REMEDY}") from None
        return [self._parse(line_number, line) for line_number, line in enumerate(lines, start=1)]

    def truncate_after(self, step: int) -> None:
        """Drop every row of a later step; a resumed run writes those again.

        The file is replaced in one move: a crash leaves the old rows or the new ones.
        """
        if not self.path.exists():
            return
        lines = [_line(row) + "\n" for row in self.rows() if row["step"] <= step]
        # Flushed first: metrics of days of training must survive a power failure here.
        write_text(self.path, "".join(lines), fsync=True)

    def _parse(self, line_number: int, line: str) -> dict[str, Any]:
        where = f"{self.path}, line {line_number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error}); {self._REMEDY}") from None
        step = row.get("step") if isinstance(row, dict) else None
        # bool is a subclass of int: `true` would pass as step 1.
        if isinstance(step, bool) or not isinstance(step, int):
            raise UserError(f"{where}: no object with a step; {self._REMEDY}")
        return {key: _from_json(value) for key, value in row.items()}


def _line(row: Row) -> str:
    values = {key: _to_json(value) for key, value in row.items()}
    return json.dumps(values, allow_nan=False, ensure_ascii=False)


def _to_json(value: float | int | str | list[str]) -> float | int | str | list[str]:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _from_json(value: Any) -> Any:
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


class TensorBoard:
    """Scalars for TensorBoard in a folder, through torch's own writer."""

    def __init__(self, folder: Path, *, purge_step: int | None = None) -> None:
        """
        Args:
            folder: Where the event files go; made if missing.
            purge_step: On resume, the first step that is written again: TensorBoard then hides
                what an earlier run wrote for this step and later ones.

        Raises:
            OSError: The folder cannot be written to; the error names it.
        """
        # Here: it imports torch, and `internvl models` shall start without it.
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        with names_file(folder):
            self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers of one step; NaN and infinities are kept."""
        with names_file(self.folder):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what waits in memory.

        Raises:
            OSError: It could not be written; the error names the folder.
        """
        with names_file(self.folder):
            self._writer.close()
