"""Reads captions from text files: a line for every caption, or a CSV with a header."""

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from internvl.data.captions.caption_file import CaptionFile
from internvl.data.images import IMAGE_ENDINGS
from internvl.data.texts import read_text
from internvl.errors import DataError

TEXT_KEYS = ("caption", "captions", "text", "texts")
_IMAGE_COLUMNS = ("image", "image_name", "filepath", "file_name", "filename")
_TEXT_COLUMNS = (*TEXT_KEYS, "title", "comment")

_ENDINGS = "|".join(ending.lstrip(".") for ending in IMAGE_ENDINGS)
# The comma alone does not end a name: both names and captions may hold commas.
_NAME_END = re.compile(rf"\.(?:{_ENDINGS}),", re.IGNORECASE)
# Flickr30K-CN numbers its texts `name.jpg#zhb#0`.
_NUMBERED = re.compile(r"(.*?)(?:#\w+)+", re.DOTALL)
_SPACED = re.compile(rf"(\S+\.(?:{_ENDINGS})(?:#\w+)+)\s+(.*)", re.IGNORECASE)
_PIPED = re.compile(r"([^|,\t]+)\|\s*(?:\d+|\w+_number)\s*\|(.*)")
# A caption in quotes that a CSV writer had to put there: it holds a comma or doubled quotes.
_QUOTED = re.compile(r'[^",]*,\s*"(?=[^\n]*(?:,|""))(?:[^"]|"")*"\s*')
_RECORD_LINES = 50  # most lines of a CSV record, whose quotes may hold line ends

SplitLine = Callable[[str], tuple[str, str] | str]
"""Splits a line into (image, caption), or returns what is wrong with it."""


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line); blank lines at the end of the file are dropped."""
    # Not `splitlines`: captions may hold U+2028 and other marks that it cuts at.
    for line_number, line in enumerate(text.rstrip().split("\n"), start=1):
        # Concatenated files leave their byte-order marks in the middle.
        yield line_number, line.removeprefix("\ufeff")


def split_flickr(line: str) -> tuple[str, str] | str:
    """Splits `name.jpg,caption` after the file ending: a name and a caption may hold commas."""
    # The usual line, without a regular expression.
    name, mark, text = line.partition(".jpg,")
    if mark and "," not in name and ".jpg," not in text:
        return (f"{name}.jpg" if name.strip() else ""), text
    if line.startswith('"'):
        return _quoted_line(line)
    end = _NAME_END.search(line)
    if end is None:
        name, mark, text = line.partition(",")
        return (name, text) if mark else "not `name.jpg,caption`"
    ending, name, text = end[0], line[: end.end() - 1], line[end.end() :]
    if ending.lower() in text.lower():
        return f"not `name.jpg,caption`: `{ending}` stands in it twice; quote the caption"
    return (name if name.strip() != ending[:-1] else ""), text


def _quoted_line(line: str) -> tuple[str, str] | str:
    try:
        name, *rest = next(csv.reader([line], strict=True, skipinitialspace=True))
    except csv.Error as error:
        return f"its quotes are not those of a CSV line ({error})"
    return (name, ",".join(rest)) if rest else "only one column; write `image,caption`"


def split_token(line: str) -> tuple[str, str] | str:
    """Splits `name#0<TAB>caption` or `name#zhb#0<TAB>caption`; a space may replace the tab."""
    name, tab, text = line.partition("\t")
    if not tab:
        spaced = _SPACED.fullmatch(line)
        if spaced is None:
            return "not `name#0<TAB>caption`"
        name, text = spaced[1], spaced[2]
    numbered = _NUMBERED.fullmatch(name.strip())
    return (numbered[1] if numbered else name), text


def split_any(line: str) -> tuple[str, str] | str:
    """Splits a line of any of these forms by the mark that ends its name."""
    # A tab behind `name.jpg,` belongs to the caption.
    tab = line.find("\t")
    if tab >= 0 and _NAME_END.search(line, 0, tab) is None:
        return split_token(line)
    piped = _PIPED.fullmatch(line) if "|" in line else None
    if piped is not None:
        return piped[1], piped[2]
    if "#" in line and _SPACED.fullmatch(line):
        return split_token(line)
    return split_flickr(line) if "," in line else "neither `image,caption` nor `name#0<TAB>caption`"


def read_lines(file: CaptionFile, split: SplitLine) -> None:
    """Reads a line for every caption, or as a CSV if the file quotes like one."""
    text = read_text(file.path)
    if split is not split_token and _is_csv(file.path, text):
        read_csv(file, text)
        return
    for line_number, line in numbered_lines(text):
        if line_number == 1 and _is_header(line):
            continue
        where = f"line {line_number}"
        if not line.strip():
            file.bad(where, "the line is blank; remove it")
            continue
        fields = split(line)
        if isinstance(fields, str):
            file.bad(where, fields)
            continue
        image = file.image(where, fields[0].strip(), again=True)
        if image is not None:
            file.caption(where, image, fields[1])


def _is_header(line: str) -> bool:
    """True if a first line names columns, such as `image,caption`."""
    words = [word.strip().strip('"').lower() for word in re.split(r"[,|\t]", line)]
    return words[0] in _IMAGE_COLUMNS and words[-1] in _TEXT_COLUMNS


def _is_csv(path: Path, text: str) -> bool:
    """True if this file quotes captions with commas, as a CSV writer does.

    A header with more than two columns decides, else the more frequent of quoted and bare.
    """
    head = text.partition("\n")[0].removeprefix("\ufeff")
    in_name = path.suffix.lower() == ".csv"
    if _is_header(head):
        if head.count(",") > 1:
            return True
    elif in_name and not (_NAME_END.search(head) or head.startswith('"')):
        return True  # no header and no row: `read_csv` says what is missing
    if '"' not in text:
        return False
    # Counted, for one line proves nothing: published files write `name.jpg,a caption, with commas`
    # without quotes, and may hold captions that begin and end with a quote.
    quoted = bare = 0
    for _, line in numbered_lines(text):
        if _QUOTED.fullmatch(line):
            quoted += 1
        elif '"' not in line:
            bare += "," in line.partition(",")[2]
    return quoted >= bare if in_name else quoted > bare


def read_csv(file: CaptionFile, text: str) -> None:
    """Reads a CSV whose header names an image and a caption column, or without a header of these
    two columns."""
    records = _records(text)
    _, head = next(records, (1, []))
    names = [name.strip().lower() for name in head] if isinstance(head, list) else []
    if not _is_header(",".join(names[:1] + names[-1:])) and len(names) == 2 and _looks_like(names):
        records, names = _records(text), ["image", "caption"]
    image = next((names.index(n) for n in _IMAGE_COLUMNS if n in names), None)
    caption = next((names.index(n) for n in _TEXT_COLUMNS if n in names), None)
    if image is None or caption is None:
        hint = _separator_remedy(text.partition("\n")[0])
        raise DataError(
            f"{file.path}: its first line must name a column `image` and one `caption`{hint}"
        )
    for line_number, row in records:
        where = f"line {line_number}"
        if isinstance(row, str):
            file.bad(where, row)
        elif len(row) != len(names):
            columns = f"{len(row)} columns, not {len(names)}"
            file.bad(where, f"{columns}; quote captions with commas")
        else:
            image_index = file.image(where, row[image].strip(), again=True)
            if image_index is not None:
                file.caption(where, image_index, row[caption])


def _separator_remedy(line: str) -> str:
    """Returns the remedy for a header that a spreadsheet wrote with another separator, or "".

    >>> _separator_remedy("image;caption")
    '; its columns are separated by `;`, save it with commas'
    """
    line = line.removeprefix("\ufeff").strip().lower()
    if line.startswith("sep="):
        return f"; remove the line `{line}`, which only Excel reads"
    for mark in (";", "\t", "|"):
        names = [name.strip().strip('"') for name in line.split(mark)]
        if len(names) > 1 and (names[0] in _IMAGE_COLUMNS or _looks_like(names)):
            shown = "tabs" if mark == "\t" else f"`{mark}`"
            return f"; its columns are separated by {shown}, save it with commas"
    return ""


def _looks_like(names: list[str]) -> bool:
    """True if a first line is no header but an image and its caption."""
    return names[0].endswith(IMAGE_ENDINGS)


def _records(text: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yields (first line, columns or what is wrong) of every CSV record."""
    # Not `csv.reader` over the file: it would take everything from a quote that is never closed
    # to the next quote for one caption. Here such a quote costs its own line.
    lines = [line for _, line in numbered_lines(text)]
    start = 0
    while start < len(lines):
        end, record = start + 1, lines[start]
        while record.count('"') % 2 and end < len(lines) and end - start < _RECORD_LINES:
            if _NAME_END.search(lines[end].partition(" ")[0]):
                break  # that is a record of its own
            record, end = f"{record}\n{lines[end]}", end + 1
        line_number = start + 1
        if record.count('"') % 2:
            yield line_number, "a quote is opened and not closed; close it, or double it in a text"
            start += 1
            continue
        start = end
        if not record.strip():
            yield line_number, "the line is blank; remove it"
            continue
        try:
            yield line_number, next(csv.reader([record], strict=True, skipinitialspace=True))
        except csv.Error as error:
            yield line_number, f"it is no CSV ({error}); double the quotes inside of quotes"
