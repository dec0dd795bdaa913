"""JSON files and annotation rows: one object per line, or one list of objects.

Stricter than Python's reader: text is UTF-8 without lone surrogates, and an object does not repeat
a key, because all but the last value would be lost.
"""

import codecs
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from internvl import files
from internvl.data.texts import printable, read_text
from internvl.errors import BadSample, DataError

BOM = codecs.BOM_UTF8
"""UTF-8 byte-order mark, which some editors write; not part of the text."""

TOO_DEEP = "its lists and objects are nested too deeply to be read; write them flatter"
_TOO_LONG = "a number in it has thousands of digits"

_HEAD = 1 << 20  # bytes that decide how a file is laid out
_CHUNK = 1 << 24  # bytes of a list that are read at once
_LONGEST = 1 << 28  # characters of an entry; a string that never ends would hold the whole file
_TAIL = 16  # characters that a token cut by the end of a chunk may have, strings apart
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACE = re.compile(r"[ \t\r\n]*")
# JSON has raw line ends between tokens only; rows must be equal whatever ends their lines.
_LINE_ENDS = str.maketrans("\n", " ", "\r")
_ROW_KEYS = {"conversations", "messages", "question", "chosen"}
_ONE_PER_LINE = "write one JSON object a line (JSON Lines), or one JSON list of all"

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
"""First bytes of common files that are not JSON, and the remedy for each."""


class RepeatedKeys(dict[str, Any]):
    """A JSON object that repeats a key; plain `json` would silently keep the last value."""

    repeated: str
    """The first key that is repeated."""


def _mark_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object of its pairs; one that names a key twice becomes `RepeatedKeys`."""
    row = dict(pairs)
    if len(row) == len(pairs):  # the common case costs a comparison, no search
        return row
    marked = RepeatedKeys(row)
    names = [name for name, _ in pairs]
    marked.repeated = next(name for name in names if names.count(name) > 1)
    return marked


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object of its pairs. Raises ValueError for a key that stands twice."""
    row = _mark_repeats(pairs)
    if isinstance(row, RepeatedKeys):
        raise ValueError(
            f"the key {printable(row.repeated)!r} stands twice in one object; keep one"
        )
    return row


# One decoder each: `json.loads` with a hook would make a new one for every line.
_STRICT = json.JSONDecoder(object_pairs_hook=_refuse_repeats)
_MARKING = json.JSONDecoder(object_pairs_hook=_mark_repeats)
_PLAIN = json.JSONDecoder()


def parse(data: bytes) -> Any:
    """Parses the JSON value of a line or file.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deeply, a repeated key, or a lone surrogate; its
            text says which.
    """
    try:
        text = data.removeprefix(BOM).decode()
    except UnicodeDecodeError:
        raise ValueError("not UTF-8; save the file as UTF-8") from None
    try:
        tree = _STRICT.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({json_problem(error)})") from None
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except ValueError as error:
        # Python refuses to read whole numbers of thousands of digits, and names its own setting.
        too_long = "integer string conversion" in str(error)
        raise ValueError(_TOO_LONG if too_long else str(error)) from None
    # Valid UTF-8 holds no surrogates: only an escape can make one. Saves a walk over most rows.
    if "\\ud" in text or "\\uD" in text:
        _check_surrogates(tree)
    return tree


def parse_line(text: str) -> Any:
    """Parses JSON; objects that repeat a key become `RepeatedKeys`.

    Raises:
        ValueError: not JSON, or nested too deeply.
    """
    try:
        return _MARKING.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(json_problem(error)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_problem(error: json.JSONDecodeError) -> str:
    """Returns the parser's message, or a clearer one for a comma after a complete value."""
    if error.msg == "Extra data" and error.doc[error.pos :].strip() == ",":
        return "a comma stands after it; JSON Lines has none between lines, remove it"
    return str(error)


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        DataError: missing, not UTF-8, or not JSON.
    """
    return parse_json(path, read_text(path))


def parse_json(path: Path, text: str) -> Any:
    """Parses the text of a JSON file as `parse_line`. Raises DataError if it is not JSON."""
    try:
        return parse_line(text)
    except ValueError as error:
        raise not_json(path, text, error) from None


def not_json(path: Path, text: str, error: ValueError) -> DataError:
    """Returns the error for a file that is not JSON, with its real format if that is recognized."""
    if not text.strip():
        return DataError(f"{path} is empty; fetch it again")
    actual_format = files.describe_head(text.encode(errors="replace")[:1024])
    return DataError(
        f"{path}: {actual_format}"
        if actual_format
        else f"{path} is not JSON ({error}); fetch it again"
    )


def is_blank(line: bytes) -> bool:
    """True for a line without text."""
    return not line.removeprefix(BOM).strip()


def parse_row(name: str, line: bytes) -> dict[str, Any]:
    """Parses the JSON object of a line. Raises BadSample with the `name` of the line."""
    if is_blank(line):
        raise BadSample(name, "the line is blank; remove it")
    try:
        row = parse(line)
    except ValueError as error:
        raise BadSample(name, str(error)) from None
    if not isinstance(row, dict):
        raise BadSample(name, f"a JSON object is expected, not {type(row).__name__}")
    return row


def lone_surrogates(tree: Any) -> Iterator[str]:
    """Yields a problem, with its path, for each string or key that has a lone surrogate."""
    # A stack instead of recursion: rows may be nested as deeply as the parser allows.
    stack: list[tuple[str, Any]] = [("", tree)]
    while stack:
        key_path, value = stack.pop()
        if isinstance(value, str):
            surrogate = _SURROGATE.search(value)
            if surrogate:
                code = printable(surrogate[0])
                subject = f"`{printable(key_path)}` holds" if key_path else "it is"
                yield f"{subject} half a character ({code}); write the whole one, or remove it"
        elif isinstance(value, list):
            # Reversed, because a stack pops the last one first: problems come in file order.
            stack += [(f"{key_path}[{n}]", item) for n, item in reversed([*enumerate(value)])]
        elif isinstance(value, dict):
            for key, item in reversed(value.items()):
                item_path = f"{key_path}.{key}".lstrip(".")
                stack += [(item_path, item), (item_path, key)]


def _check_surrogates(tree: Any) -> None:
    for problem in lone_surrogates(tree):
        raise ValueError(problem)


def is_list(path: Path) -> bool:
    """Returns True for a JSON list or one multi-line object, False for JSON Lines.

    Decides by the first MiB, so that a file of any size costs one read.

    Raises:
        DataError: none of these: several multi-line objects, an object of lists, another format.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    check_beginning(path, head)
    start = head.removeprefix(BOM).lstrip()
    if start[:1] not in (b"[", b"{"):
        return False
    line, _, rest = start.partition(b"\n")
    # A first line that goes on past the head cannot be judged by what was read of it.
    fits = len(line) < len(start) or len(head) < _HEAD
    if fits and _is_json(line):
        alone = not rest.strip()
        if alone:
            _check_object(path)
        return alone and start[:1] == b"["
    if start[:1] == b"[":
        return True
    # Split at "\n", such a file would be a single line that parses up to its first object.
    if b"\r" in start.rstrip() and b"\n" not in start:
        raise DataError(f"{path} has the line ends of old Macs (CR alone); save it with LF or CRLF")
    end = _end_of_object(start)
    if end is None:
        return False
    if start[end:].strip():
        raise DataError(f"{path} holds JSON objects over several lines each; {_ONE_PER_LINE}")
    _check_object(path)
    return True


def check_beginning(path: Path, head: bytes) -> None:
    """Raises DataError if the first bytes of a file show that it is not UTF-8 text."""
    # In order: the mark of UTF-32 begins with that of UTF-16.
    for beginning, remedy in _FOREIGN.items():
        if head.startswith(beginning):
            raise DataError(f"{path} is {remedy}")
    if b"\x00" in head[:4]:
        raise DataError(f"{path} is UTF-16 or UTF-32; save it as UTF-8")
    # The last line of a full head may be cut within a character.
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
    """Returns the end, in bytes, of the multi-line object that begins a file's head.

    The head's length if the object goes on past it; None if its first line is not JSON.
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
    """Raises DataError for a file of one object that holds rows instead of being a row."""
    try:
        tree = _PLAIN.decode(path.read_bytes().removeprefix(BOM).decode(errors="replace"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); {_ONE_PER_LINE}") from None
    if not isinstance(tree, dict) or tree.keys() & _ROW_KEYS:
        return
    # Such as {"train": [rows], "test": [rows]}: as one row it would be a single bad sample.
    holds = [
        f"{printable(key)!r}" + (f" ({len(value):,} entries)" if isinstance(value, list) else "")
        for key, value in tree.items()
        if (isinstance(value, list) and any(isinstance(item, dict) for item in value))
        or (isinstance(value, dict) and value.keys() & _ROW_KEYS)
    ]
    if holds:
        some = ", ".join(holds[:4]) + (", …" if len(holds) > 4 else "")
        raise DataError(f"{path} is one JSON object that holds {some}; {_ONE_PER_LINE}")


def entries(path: Path) -> Iterator[str]:
    """Yields the entries of a JSON list verbatim, each on one line; an object is one entry.

    Holds one entry in memory, whatever the size of the file.

    Raises:
        DataError: the file is not UTF-8, or an entry is not JSON.
    """
    reader = _Reader(path)
    if not reader.accept("["):
        yield reader.value(1).translate(_LINE_ENDS)
    else:
        entry = 1
        while not (entry == 1 and reader.accept("]")):  # `]` ends an empty list only: no ",]"
            yield reader.value(entry).translate(_LINE_ENDS)
            entry += 1
            if reader.accept("]"):
                break
            if not reader.accept(","):
                raise DataError(reader.problem(entry - 1, "no comma and no `]` after it"))
    if reader.skip_space():
        raise DataError(f"{path}: text follows the end of its JSON list; {_ONE_PER_LINE}")


class _Reader:
    """Incremental JSON scanner: holds the text from the current position to the last chunk read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = ""
        self.position = 0
        self.chunks = self._chunks()

    def _chunks(self) -> Iterator[str]:
        # Incremental: a chunk may end within a character.
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        try:
            with self.path.open("rb") as file:
                while data := file.read(_CHUNK):
                    yield decoder.decode(data)
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            raise DataError(f"{self.path} is not UTF-8; save it as UTF-8") from None

    def _read(self) -> bool:
        """Appends a chunk. Returns False at the end of the file."""
        for chunk in islice(self.chunks, 1):
            self.text = self.text[self.position :] + chunk  # drops what was consumed
            self.position = 0
            return True
        return False

    def skip_space(self) -> bool:
        """Moves to the next character that is not space. Returns False at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.position)
            self.position = self.position if match is None else match.end()
            if self.position < len(self.text):
                return True
            if not self._read():
                return False

    def accept(self, character: str) -> bool:
        """Moves past `character` if it comes next. Returns whether it does."""
        if not self.skip_space() or self.text[self.position] != character:
            return False
        self.position += 1
        return True

    def value(self, entry: int) -> str:
        """Returns the next JSON value verbatim. `entry`, from 1, is for messages."""
        if not self.skip_space():
            raise DataError(self.problem(entry, "the file ends before it; fetch it again"))
        while True:
            try:
                _, end = _PLAIN.raw_decode(self.text, self.position)
                # A number or literal that ends with the chunk may continue in the next one.
                if end < len(self.text) or not self._read():
                    value = self.text[self.position : end]
                    self.position = end
                    return value
            except json.JSONDecodeError as error:
                # Near its end, the chunk may cut a token; an open string is cut wherever it began.
                cut = error.pos >= len(self.text) - _TAIL
                cut = cut or error.msg.startswith("Unterminated string")
                if not cut or len(self.text) - self.position > _LONGEST:
                    raise DataError(self.problem(entry, f"not JSON ({error.msg})")) from None
                if not self._read():
                    reason = f"not JSON ({error.msg}); the file may be cut off"
                    raise DataError(self.problem(entry, reason)) from None
            except RecursionError:
                raise DataError(self.problem(entry, TOO_DEEP)) from None
            except ValueError:
                raise DataError(self.problem(entry, _TOO_LONG)) from None

    def problem(self, entry: int, reason: str) -> str:
        return f"{self.path} entry {entry}: {reason}"
