"""JSON annotation files as rows: one object a line, or one list of objects.

Strict where Python's own reader is not: text is UTF-8 and whole characters, and no key stands twice
in an object, for the first of the two would be lost.
"""

import codecs
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from internvl.data.texts import json_problem
from internvl.errors import BadSample, DataError

BOM = codecs.BOM_UTF8
"""What some editors write before UTF-8; it is no part of the text."""

TOO_DEEP = "its lists and objects are nested too deeply to be read; write them flatter"
_TOO_LONG = "a number in it has thousands of digits"

_HEAD = 1 << 20  # bytes that decide how a file is laid out
_CHUNK = 1 << 24  # bytes of a list that are read at once
_LONGEST = 1 << 28  # characters of an entry; a string that never ends would hold the whole file
_TAIL = 16  # characters that a token cut by the end of a chunk may have, strings apart
_HALF = re.compile("[\ud800-\udfff]")
_SPACE = re.compile(r"[ \t\r\n]*")
# Outside strings, where JSON allows them, they are space; rows are the same with any line end.
_LINE_ENDS = str.maketrans("\n", " ", "\r")
_ROW_KEYS = {"conversations", "messages", "question"}
_ONE_A_LINE = "write one JSON object a line (JSON Lines), or one JSON list of all"

_FOREIGN = {
    b"\xff\xfe\x00\x00": "UTF-32; save it as UTF-8",
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
    b"\x1f\x8b": "compressed by gzip; unpack it",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"BZh": "compressed by bzip2; unpack it",
    b"\xfd7zXZ": "compressed by xz; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it",
    b"PAR1": "a Parquet file; give its source `type: parquet`",
    b"ARROW1": "an Arrow file; give its source `type: parquet`",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run `git lfs pull`",
    b"<!DOCTYPE": "a web page; fetch the file itself",
    b"<!doctype": "a web page; fetch the file itself",
    b"<html": "a web page; fetch the file itself",
}
"""First bytes of files that are no JSON, and what to do with them."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its pairs. Raises ValueError for a key that stands twice."""
    tree = dict(pairs)
    if len(tree) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {printable(twice)!r} stands twice in one object; keep one")
    return tree


_DECODER = json.JSONDecoder(object_pairs_hook=_once)
_PLAIN = json.JSONDecoder()


def parse(data: bytes) -> Any:
    """The JSON value in a line or file.

    Raises:
        ValueError: it is not JSON, not UTF-8, nested too deeply, or holds a key twice in an object
            or half a character; its text says which.
    """
    try:
        text = data.removeprefix(BOM).decode()
    except UnicodeDecodeError:
        raise ValueError("not UTF-8; save the file as UTF-8") from None
    try:
        tree = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({json_problem(error)})") from None
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except ValueError as error:
        # Python refuses to read whole numbers of thousands of digits, and names its own setting.
        too_long = "integer string conversion" in str(error)
        raise ValueError(_TOO_LONG if too_long else str(error)) from None
    # Only an escape can make half a character of valid UTF-8.
    if "\\ud" in text or "\\uD" in text:
        _check_characters(tree)
    return tree


def parse_row(name: str, line: bytes) -> dict[str, Any]:
    """The JSON object in a line. Raises BadSample with the `name` of the line."""
    if not line.removeprefix(BOM).strip():
        raise BadSample(name, "the line is blank; remove it")
    try:
        row = parse(line)
    except ValueError as error:
        raise BadSample(name, str(error)) from None
    if not isinstance(row, dict):
        raise BadSample(name, f"a JSON object is expected, not {type(row).__name__}")
    return row


def printable(text: str) -> str:
    r"""Text that any file or terminal takes: halves of characters written as \udxxx."""
    return text.encode("utf-8", "backslashreplace").decode()


def halves(tree: Any) -> Iterator[str]:
    """What is wrong with each text (or key) of a tree that holds half a character, and where."""
    stack: list[tuple[str, Any]] = [("", tree)]
    while stack:
        where, value = stack.pop()
        if isinstance(value, str):
            half = _HALF.search(value)
            if half:
                code = printable(half[0])
                what = f"`{printable(where)}` holds" if where else "it is"
                yield f"{what} half a character ({code}); write the whole one, or remove it"
        elif isinstance(value, list):
            stack += [(f"{where}[{n}]", item) for n, item in reversed([*enumerate(value)])]
        elif isinstance(value, dict):
            for key, item in reversed(value.items()):
                stack += [(f"{where}.{key}".lstrip("."), item), (f"{where}.{key}".lstrip("."), key)]


def _check_characters(tree: Any) -> None:
    for what in halves(tree):
        raise ValueError(what)


# How a file is laid out


def is_list(path: Path) -> bool:
    """Whether a file is one JSON list, or one JSON object over several lines, not JSON Lines.

    Raises:
        DataError: it is neither: objects over several lines one after the other, an object of
            lists, another kind of file.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    check_beginning(path, head)
    start = head.removeprefix(BOM).lstrip()
    if start[:1] not in (b"[", b"{"):
        return False
    line, _, rest = start.partition(b"\n")
    fits = len(line) < len(start) or len(head) < _HEAD
    if fits and _is_json(line):
        alone = not rest.strip()
        if alone:
            _check_object(path)
        return alone and start[:1] == b"["
    if start[:1] == b"[":
        return True
    if b"\r" in start.rstrip() and b"\n" not in start:
        raise DataError(f"{path} has the line ends of old Macs (CR alone); save it with LF or CRLF")
    end = _end_of_object(start)
    if end is None:
        return False
    if start[end:].strip():
        raise DataError(f"{path} holds JSON objects over several lines each; {_ONE_A_LINE}")
    _check_object(path)
    return True


def check_beginning(path: Path, head: bytes) -> None:
    """Raises DataError for the first bytes of a file that is no text in UTF-8 at all."""
    for beginning, what in _FOREIGN.items():
        if head.startswith(beginning):
            raise DataError(f"{path} is {what}")
    if b"\x00" in head[:4]:
        raise DataError(f"{path} is UTF-16 or UTF-32; save it as UTF-8")
    lines = head.splitlines()[: -1 if len(head) == _HEAD else None]
    bad = sum(not _is_utf8(line) for line in lines)
    # A broken line is a bad sample; a file in another encoding is not thousands of them.
    if len(lines) > 1 and 2 * bad > len(lines):
        raise DataError(f"{path} is not UTF-8; save it as UTF-8")


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_json(line: bytes) -> bool:
    try:
        _PLAIN.decode(line.decode())
    except (ValueError, RecursionError):
        return False
    return True


def _end_of_object(start: bytes) -> int | None:
    """Where the object at the start of a file's head ends, if it goes over several lines.

    The head's length where it does not end there; None where its first line is broken.
    """
    text = start.decode(errors="replace")
    try:
        _, end = _PLAIN.raw_decode(text)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text) - _TAIL or error.msg.startswith("Unterminated string")
        return len(start) if cut and "\n" in text[: error.pos] else None
    except (ValueError, RecursionError):
        return None
    return len(text[:end].encode()) if "\n" in text[:end] else None


def _check_object(path: Path) -> None:
    """Raises DataError for a file of one object that holds rows instead of being one."""
    try:
        tree = _PLAIN.decode(path.read_bytes().removeprefix(BOM).decode(errors="replace"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); {_ONE_A_LINE}") from None
    if not isinstance(tree, dict) or tree.keys() & _ROW_KEYS:
        return
    holds = [
        f"{printable(key)!r}" + (f" ({len(value):,} entries)" if isinstance(value, list) else "")
        for key, value in tree.items()
        if (isinstance(value, list) and any(isinstance(item, dict) for item in value))
        or (isinstance(value, dict) and value.keys() & _ROW_KEYS)
    ]
    if holds:
        some = ", ".join(holds[:4]) + (", …" if len(holds) > 4 else "")
        raise DataError(f"{path} is one JSON object that holds {some}; {_ONE_A_LINE}")


def entries(path: Path) -> Iterator[str]:
    """The entries of a JSON list as they are written, each on one line; an object is one entry.

    Holds an entry at a time, whatever the size of the file.

    Raises:
        DataError: the file is not UTF-8, or no JSON list from some entry on.
    """
    reader = _Reader(path)
    if not reader.begins("["):
        yield reader.value(1).translate(_LINE_ENDS)
    else:
        number = 1
        while not (number == 1 and reader.begins("]")):
            yield reader.value(number).translate(_LINE_ENDS)
            number += 1
            if reader.begins("]"):
                break
            if not reader.begins(","):
                raise DataError(reader.says(number - 1, "no comma and no `]` after it"))
    if reader.more():
        raise DataError(f"{path}: text follows the end of its JSON list; {_ONE_A_LINE}")


class _Reader:
    """The text of a file from a position on, read as far as it is needed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = ""
        self.place = 0
        self.chunks = self._chunks()

    def _chunks(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        try:
            with self.path.open("rb") as file:
                while data := file.read(_CHUNK):
                    yield decoder.decode(data)
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            raise DataError(f"{self.path} is not UTF-8; save it as UTF-8") from None

    def _read(self) -> bool:
        """Reads on; whether there was more."""
        for chunk in islice(self.chunks, 1):
            self.text = self.text[self.place :] + chunk
            self.place = 0
            return True
        return False

    def more(self) -> bool:
        """Whether anything but space is left; what comes first then stands at `place`."""
        while True:
            match = _SPACE.match(self.text, self.place)
            self.place = self.place if match is None else match.end()
            if self.place < len(self.text):
                return True
            if not self._read():
                return False

    def begins(self, mark: str) -> bool:
        """Whether `mark` comes next; it is then passed."""
        if not self.more() or self.text[self.place] != mark:
            return False
        self.place += 1
        return True

    def value(self, number: int) -> str:
        """The next JSON value as it is written, the `number`th of the file."""
        if not self.more():
            raise DataError(self.says(number, "the file ends before it; fetch it again"))
        while True:
            try:
                _, end = _PLAIN.raw_decode(self.text, self.place)
                # A number or word at the end of what was read may go on.
                if end < len(self.text) or not self._read():
                    value = self.text[self.place : end]
                    self.place = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self.text) - _TAIL
                cut = cut or error.msg.startswith("Unterminated string")
                if not cut or len(self.text) - self.place > _LONGEST:
                    raise DataError(self.says(number, f"not JSON ({error.msg})")) from None
                if not self._read():
                    what = f"not JSON ({error.msg}); the file may be cut off"
                    raise DataError(self.says(number, what)) from None
            except RecursionError:
                raise DataError(self.says(number, TOO_DEEP)) from None
            except ValueError:
                raise DataError(self.says(number, _TOO_LONG)) from None

    def says(self, number: int, what: str) -> str:
        return f"{self.path} entry {number}: {what}"
