"""Groups the problems of a check: one line for many samples that are bad for the same reason.

Reasons are the same if they differ in numbers, paths and quoted texts alone; the line has the range
of the numbers and what the paths have in common, the first places, and the values of the recipe
with which all of them would be good.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from internvl.config import DataConfig
from internvl.errors import BadSample, counted

SHOWN = 20
"""Groups that a message lists; the others are only counted."""
_SHOWN_PLACES = 3
_ROUND = 64
"""Tokens that a suggested length is rounded up to a multiple of."""

# A quoted text, a path, a file's name, a number. Longer ones first: a path may hold a number.
_VARYING = re.compile(
    r"""(?P<quoted>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
    r"|(?P<path>[^\s'\"`(]*/[^\s'\"`():;,]*|[^\s'\"`()/]+\.[A-Za-z]\w{1,4}\b(?!\w|\.))"
    r"|(?P<count>\d[\d,]*(?:\.\d+)?)"
)
_ENDING = re.compile(r"([/.].*|['\"]?)$", re.DOTALL)
_PLACE = re.compile(r"(?P<file>.*) (?P<unit>[a-z]+) (?P<index>\d+)$", re.DOTALL)


@dataclass(frozen=True)
class Group:
    """Problems with the same reason."""

    problems: Sequence[BadSample]
    reason: str
    """The reason of all; numbers that differ are a range, other differences are an ellipsis."""
    places: str
    """Places of the first ones, and the count of the rest."""
    remedy: str
    """Values of the recipe's keys that make all of them good; "" if no key does."""

    @property
    def line(self) -> str:
        """The group as one line of text."""
        remedy = f"; {self.remedy}" if self.remedy else ""
        if len(self.problems) == 1:
            return f"{self.problems[0]}{remedy}"
        return f"{len(self.problems):,} x {self.reason} ({self.places}){remedy}"


def group(problems: Sequence[BadSample], data: DataConfig) -> list[Group]:
    """Groups problems by their reason, the largest group first.

    Args:
        data: the recipe's section, whose values the remedies change.
    """
    by_pattern: dict[str, list[BadSample]] = {}
    for problem in problems:
        pattern = _VARYING.sub(lambda match: f"<{match.lastgroup}>", problem.reason)
        by_pattern.setdefault(pattern, []).append(problem)
    groups = [
        Group(alike, _common([bad.reason for bad in alike]), _places(alike), _remedy(alike, data))
        for alike in by_pattern.values()
    ]
    # Stable, so that groups of one size stay in the order of the files.
    return sorted(groups, key=lambda same: -len(same.problems))


def lines(problems: Sequence[BadSample], data: DataConfig) -> Iterator[str]:
    """Yields the count of problems, and a line for each group of the first SHOWN."""
    if not problems:
        yield "no problem found"
        return
    groups = group(problems, data)
    several = f" of {counted(len(groups), 'kind')}" if len(groups) < len(problems) else ""
    yield counted(len(problems), "problem") + several
    for same in groups[:SHOWN]:
        yield f"  {same.line}"
    if len(groups) > SHOWN:
        rest = sum(len(same.problems) for same in groups[SHOWN:])
        yield f"  and {rest:,} more"


def _common(reasons: Sequence[str]) -> str:
    """Returns one text for reasons of the same pattern."""
    values = [[match[0] for match in _VARYING.finditer(reason)] for reason in reasons]
    merged = iter([_merged(column) for column in zip(*values, strict=True)])
    return _VARYING.sub(lambda _: next(merged), reasons[0])


def _merged(values: Sequence[str]) -> str:
    """Returns a value that all share, a range of numbers, or what texts begin and end with."""
    if len(set(values)) == 1:
        return values[0]
    if all(value[0].isdigit() and "/" not in value for value in values):
        try:
            by_size = sorted(values, key=lambda value: float(value.replace(",", "")))
            return f"{by_size[0]} to {by_size[-1]}"
        except ValueError:  # the name of a file, such as 1.jpg
            pass
    start = _common_start(values)
    # Reversed; what is in `start` already does not count twice.
    end = _common_start([value[len(start) :][::-1] for value in values])[::-1]
    # Of a name only its ending: the g of .jpg and .png is none.
    return f"{start}…{_ENDING.search(end)[0]}"  # type: ignore[index]  # matches any text


def _common_start(values: Sequence[str]) -> str:
    """Returns the characters that all values begin with."""
    # All values lie between these two.
    first, last = min(values), max(values)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(character for character, _ in same)


def _places(problems: Sequence[BadSample]) -> str:
    """Returns the places of the first problems: "a.jsonl lines 3, 7, 9 and 12 more"."""
    names = list(dict.fromkeys(problem.name for problem in problems))
    shown = names[:_SHOWN_PLACES]
    matches = [match for match in map(_PLACE.match, shown) if match]
    text = ", ".join(shown)
    if len(matches) == len(shown) > 1 and len({m.group("file", "unit") for m in matches}) == 1:
        unit = matches[0]["unit"]
        units = "entries" if unit == "entry" else f"{unit}s"
        text = f"{matches[0]['file']} {units} {', '.join(match['index'] for match in matches)}"
    rest = len(names) - len(shown)
    return f"{text} and {rest:,} more" if rest else text


def _remedy(problems: Sequence[BadSample], data: DataConfig) -> str:
    """Returns the `key=value` words that make all problems good, or ""."""
    if not all(problem.needs for problem in problems):
        return ""
    values: dict[str, int] = {}
    for problem in problems:
        for key, value in problem.needs.items():
            values[key] = max(value, values.get(key, 0))
    tokens = values.get("data.max_tokens")
    if tokens is not None:
        tokens = values["data.max_tokens"] = -(-tokens // _ROUND) * _ROUND
        # A row takes any sample.
        if data.row_tokens is not None and data.row_tokens < tokens:
            values["data.row_tokens"] = tokens
    words = " ".join(f"{key}={value}" for key, value in values.items())
    verb = "keeps" if len(values) == 1 else "keep"
    return f"{words} {verb} {'it' if len(problems) == 1 else f'all {len(problems):,}'}"


def table_rows(problems: Sequence[BadSample], data: DataConfig) -> list[tuple[str, ...]]:
    """Returns (count, reason, places, remedy) of the first SHOWN groups, for a page."""
    return [
        (f"{len(same.problems):,}", same.reason, same.places, same.remedy)
        for same in itertools.islice(group(problems, data), SHOWN)
    ]
