"""What evaluators share: their results, and what becomes of the problems in their data."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from internvl.data.images import FileSlice
from internvl.data.texts import problem_lines
from internvl.errors import BadSample, UserError
from internvl.log import get_logger


@dataclass(frozen=True)
class EvalScores:
    """What an evaluator found."""

    values: dict[str, float]
    """Metric -> value."""
    rows: list[dict[str, Any]]
    """One for every image or text, and one for everything that was left out."""


def file_state(image: str | FileSlice) -> tuple[int, int]:
    """Size and time of a file, by which another one under its name is told; an address has none,
    an image in a tar those of the tar."""
    path = image.path if isinstance(image, FileSlice) else image
    if not os.path.exists(path):
        return 0, 0
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns


class DataProblems(UserError):
    """Problems in the data of an evaluation; the message lists the first of very many."""

    def __init__(self, problems: Sequence[BadSample], remedy: str) -> None:
        head = f"{len(problems):,} problem(s) in the data; {remedy}"
        super().__init__("\n".join([head, *problem_lines(problems)]))
        self.problems = problems


def settle(problems: Sequence[BadSample], policy: str, remedy: str) -> None:
    """Raises for problems, or logs them, as `on_bad_sample` says.

    Raises:
        DataProblems: with the policy "raise"; all of them.
    """
    if not problems:
        return
    if policy == "raise":
        raise DataProblems(problems, remedy)
    lines = "\n".join(problem_lines(problems))
    get_logger().warning("%d problem(s) in the data:\n%s", len(problems), lines)


def left_out(problems: Sequence[BadSample]) -> list[dict[str, Any]]:
    """A row of the result for everything that was not measured."""
    return [{"sample": problem.name, "reason": problem.reason} for problem in problems]
