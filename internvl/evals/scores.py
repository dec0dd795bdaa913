"""What evaluators share: their results, and what becomes of the problems in their data."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from internvl.config import UserError
from internvl.data.images import FileSlice
from internvl.data.records import BadSample
from internvl.log import get_logger

_SHOWN = 20


@dataclass(frozen=True)
class Scores:
    """What an evaluator found."""

    values: dict[str, float]
    """Metric -> value."""
    rows: list[dict[str, Any]]
    """One for every picture or text."""


def file_state(picture: str | FileSlice) -> tuple[int, int]:
    """Size and time of a file, by which another one under its name is told; an address has none,
    a picture in a tar those of the tar."""
    path = picture.path if isinstance(picture, FileSlice) else picture
    if not os.path.exists(path):
        return 0, 0
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns


def settle(problems: Sequence[BadSample], policy: str, remedy: str) -> None:
    """Raises for problems, or logs them, as `on_bad_sample` says.

    Raises:
        UserError: with the policy "raise"; all problems, or the first of very many.
    """
    if not problems:
        return
    lines = [str(problem) for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"and {len(problems) - _SHOWN:,} more")
    if policy == "raise":
        raise UserError("\n".join([f"{len(problems)} problem(s) in the data; {remedy}", *lines]))
    get_logger().warning("%d problem(s) in the data:\n%s", len(problems), "\n".join(lines))
