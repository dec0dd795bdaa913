"""Results of evaluators, and the policy for problems in their data."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import PurePath
from typing import Any

from internvl import dist
from internvl.data.images import FileSlice
from internvl.data.texts import problem_lines
from internvl.errors import BadSample, UserError, counted
from internvl.log import get_logger

LEFT_OUT = "left out"
"""Name of the count of items that could not be measured, if there are any."""


@dataclass(frozen=True)
class EvalScores:
    """Result of one evaluator."""

    values: dict[str, float]
    """Metric -> value."""
    rows: list[dict[str, Any]]
    """One for every image or text, and one for every skipped sample."""
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    """Name of a result file in the original's form -> its content."""
    lines: Mapping[str, str] = field(default_factory=dict)
    """Name of a summary file -> lines that are appended to it."""
    notes: tuple[str, ...] = ()
    """Sentences about the result, such as where its answers are scored."""
    images: Callable[[int], Sequence[Any]] | None = None
    """Index of a row -> its images, for a page of rows whose images are no files; None if all
    are."""


@dataclass(frozen=True)
class TableRow:
    """A row of `Table`."""

    label: str
    metrics: tuple[str, ...]
    """A metric for each column."""
    mean: str | None = None
    """The metric that is the mean of this row and those above it, written after it."""


@dataclass(frozen=True)
class Table:
    """How an evaluation with several modes shows its metrics: as percentages, in rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]

    def render(
        self, values: Mapping[str, float], published: Mapping[str, float] | None = None
    ) -> list[str]:
        """Returns the lines of the table, its head first.

        Args:
            values: metric -> value from 0 to 1.
            published: the same for published values, which follow in brackets.
        """
        published = published or {}
        # Brackets in some cells widen all: numbers of a column stay below each other.
        cell = max(16 if published else 8, *(len(name) + 2 for name in self.columns))
        left = max(len(self.title), *(len(row.label) for row in self.rows))

        # One decimal for published values, as papers print them.
        def shown(metric: str) -> str:
            printed = f" ({published[metric]:.1%})".replace("%", "") if metric in published else ""
            return f"{100 * values[metric]:.2f}{printed}"

        lines = [f"{self.title:{left}}" + "".join(f"{name:>{cell}}" for name in self.columns)]
        for row in self.rows:
            mean = "" if row.mean is None else f"   mean {shown(row.mean)}"
            cells = "".join(f"{shown(metric):>{cell}}" for metric in row.metrics)
            lines.append(f"{row.label:{left}}{cells}{mean}")
        return lines


def fingerprint(image: str | PurePath | FileSlice) -> tuple[int, int]:
    """(size in bytes, mtime in ns) of a file; (0, 0) for an address."""
    # An image inside a tar has no file of its own: a changed tar counts for all its images.
    path = image.path if isinstance(image, FileSlice) else image
    if not os.path.exists(path):
        return 0, 0
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns


def version(name: str) -> str:
    """Returns the version of an installed package, "" for a source tree."""
    try:
        return installed(name)
    except PackageNotFoundError:
        return ""


def model_file(checkpoint: str) -> str:
    """Returns the last two parts of a checkpoint's path, as the original's files name it."""
    return "_".join(name for name in PurePath(checkpoint).parts[-2:] if name != "/")


class DataProblems(UserError):
    """Problems in the data of an evaluation; the message lists only the first of many."""

    def __init__(self, problems: Sequence[BadSample], remedy: str) -> None:
        head = f"{counted(len(problems), 'problem')} in the data; {remedy}"
        super().__init__("\n".join([head, *problem_lines(problems)]))
        self.problems = problems  # all of them, for `internvl check`


def raise_or_log(problems: Sequence[BadSample], policy: str, remedy: str) -> None:
    """Raises or logs `problems`.

    Args:
        policy: value of `on_bad_sample`; anything but "raise" logs a warning.
        remedy: what the user should do, for the message.

    Raises:
        DataProblems: all of them, if `policy` is "raise".
    """
    if not problems:
        return
    if policy == "raise":
        raise DataProblems(problems, remedy)
    # All ranks have read the same data; one of them says so.
    if not dist.is_main():
        return
    lines = "\n".join(problem_lines(problems))
    get_logger().warning("%s in the data:\n%s", counted(len(problems), "problem"), lines)


def raise_or_log_images(
    problems: Sequence[BadSample], broken: Sequence[BadSample], policy: str, remedy: str
) -> None:
    """As `raise_or_log`, for problems of the data and, of their images, those that are broken."""
    if policy != "skip_broken":
        # A broken image cannot be kept: nothing can be computed of it.
        policy = "raise" if broken and policy == "keep" else policy
        raise_or_log([*problems, *broken], policy, remedy)
    elif problems:
        raise_or_log([*problems, *broken], "raise", remedy)
    else:
        raise_or_log(broken, "skip", remedy)


def skipped_rows(problems: Sequence[BadSample]) -> list[dict[str, Any]]:
    """Returns a row of the result for every sample that was not measured."""
    return [{"sample": problem.name, "reason": problem.reason} for problem in problems]
