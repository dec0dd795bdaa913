"""What is looked for: words, images and photos of the index, with weights; folders and dates.

Imports no torch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from internvl.data.images import name_of
from internvl.errors import UserError

# A digit before the colon is a time of day or a ratio: "at 10:30".
_WEIGHTED = re.compile(r"\s*+(.+?)(?<![\d\s])\s*[:：]\s*([-+]?\d*\.?\d+)(?=\s|$)")
_DATE = re.compile(r"\d{4}(-\d\d(-\d\d)?)?")


@dataclass(frozen=True)
class Term:
    """One of text, image and digest, with its weight."""

    text: str = ""
    image: bytes | Path | None = None
    """A file, or its bytes."""
    digest: bytes = b""
    """Content of a photo of the index, whose features are there."""
    weight: float = 1.0

    @property
    def label(self) -> str:
        """The term as messages show it: "beach", "photo.jpg × -0.5"."""
        name = self.text or ("an image" if self.image is None else name_of(self.image))
        return (name or "an image") + ("" if self.weight == 1 else f" × {self.weight:g}")


def parse_terms(text: str) -> list[Term]:
    """Parses words with optional weights, English or Chinese.

    >>> parse_terms("beach:1 people:-0.5")[1]
    Term(text='people', image=None, digest=b'', weight=-0.5)
    >>> [term.text for term in parse_terms("a dog in the snow")]
    ['a dog in the snow']
    """
    # Words after the last weight are a term too, of weight 1.
    terms, end = [], 0
    while matched := _WEIGHTED.match(text, end):
        terms.append(Term(text=matched[1], weight=float(matched[2])))
        end = matched.end()
    rest = text[end:].strip()
    return [*terms, *([Term(text=rest)] if rest else [])]


def check_terms(terms: Sequence[Term]) -> None:
    """Raises UserError if there is nothing to look for."""
    if not terms:
        raise UserError('nothing to look for: write words, such as "a dog in the snow"')
    for term in terms:
        if not abs(term.weight) <= LARGEST_WEIGHT:
            raise UserError(
                f"{term.text!r}: the weight is {term.weight:g}; write one from -{LARGEST_WEIGHT:,} "
                f"to {LARGEST_WEIGHT:,}"
            )
    if all(term.weight <= 0 for term in terms):
        raise UserError(
            f"no weight is above 0 ({', '.join(term.label for term in terms)}); a search needs "
            "something to look for, as in beach:1 people:-0.5"
        )


LARGEST_WEIGHT = 1_000_000
MOST_FOLDERS = 100
"""Folders of a search, at most: SQL of many is nested too deeply."""
MOST_RERANKED = 1000
"""Photos that the match head reads for a search, at most."""

LARGEST_PAGE = 10_000
"""Photos of a page, at most."""


def check_page(page_size: int, skip: int, rerank: int) -> None:
    """Raises UserError for numbers of photos out of range; see `Searcher.find`."""
    if page_size < 1:
        raise UserError(f"page size: a page has at least 1 photo, not {page_size}")
    if page_size > LARGEST_PAGE:
        raise UserError(f"page size: a page has at most {LARGEST_PAGE:,} photos, not {page_size:,}")
    if skip < 0:
        raise UserError(f"skip: a search leaves out at least 0 photos, not {skip}")
    if not 0 <= rerank <= MOST_RERANKED:
        raise UserError(f"rerank is 0 to {MOST_RERANKED:,}, not {rerank}")


@dataclass(frozen=True)
class Filters:
    """Which photos are searched."""

    folders: tuple[str, ...] = ()
    """Globs of paths below the folder of photos, any of which fits: "2024", "2024/*-beach"."""
    since: str = ""
    """First day: "2024", "2024-05" or "2024-05-01"."""
    until: str = ""
    """Last day, in the same forms; "2024" is up to the end of that year."""

    def __post_init__(self) -> None:
        """Raises UserError for what is no date, or too many folders."""
        if len(self.folders) > MOST_FOLDERS:
            raise UserError(f"a search takes {MOST_FOLDERS} folders, not {len(self.folders):,}")
        for text in (self.since, self.until):
            if text and not _is_date(text):
                raise UserError(
                    f"{text!r} is no date; write 2024, 2024-05 or 2024-05-01 (year first)"
                )

    def condition(self) -> tuple[str, list[Any]]:
        """Returns a condition of SQL and its values."""
        parts, values = ["1"], []
        globs = [glob.removeprefix("./").strip("/") for glob in self.folders]
        # The folder of photos itself is everything.
        if globs and not {"", "."} & {*globs}:
            # A folder stands for all that is below it, also one that is called "[2024] beach".
            one = "path GLOB ? OR path GLOB ? OR substr(path, 1, length(?)) = ?"
            parts.append(f"({' OR '.join([one] * len(globs))})")
            for glob in globs:
                values += [glob, f"{glob}/*", f"{glob}/", f"{glob}/"]
        if self.since:
            parts.append("taken >= ?")
            values.append(self.since)
        if self.until:
            parts.append("taken < ?")
            # Above every character of a date: the end of the year, month or day.
            values.append(f"{self.until}~")
        return " AND ".join(parts), values


def _is_date(text: str) -> bool:
    if not _DATE.fullmatch(text):
        return False
    try:
        date.fromisoformat(text + "-01-01"[len(text) - 4 :])
    except ValueError:
        return False
    return True
