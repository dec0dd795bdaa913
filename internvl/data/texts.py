"""Text and JSON files read as UTF-8, or refused with a sentence; what makes a string no text."""

import codecs
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internvl import files
from internvl.errors import BadSample, DataError

PROBLEMS_SHOWN = 20
"""Problems that a message lists before it only counts them."""

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_LFS_POINTER = "version https://git-lfs.github.com/"


def read_text(path: Path) -> str:
    """Reads a UTF-8 file, with or without a byte-order mark; every line end becomes `\\n`.

    Raises:
        DataError: missing, not UTF-8, with NUL characters, or the pointer that Git LFS leaves.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path") from None
    if content.startswith(_UTF16):
        raise DataError(f"{path} is UTF-16, it is not UTF-8; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} is not UTF-8; save it as UTF-8 (line {line} is not)") from None
    if "\0" in text:
        # UTF-16 without a mark is valid UTF-8 with a NUL after every letter.
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path} is no text: line {line} holds a NUL character; save it as UTF-8")
    if text.startswith(_LFS_POINTER):
        raise DataError(f"{path} is a pointer of Git LFS, not the file; run `git lfs pull`")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        DataError: missing, no UTF-8, or no JSON.
    """
    return parse_json(path, read_text(path))


class RepeatedKeys(dict[str, Any]):
    """A JSON object that names a key twice, of which plain `json` would keep the last alone."""

    repeated: str
    """The first such key."""


def parse_line(text: str) -> Any:
    """Parses JSON; objects that name a key twice become `RepeatedKeys`.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(json_problem(error)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_problem(error: json.JSONDecodeError) -> str:
    """What is wrong with a JSON text; a comma that stands after a whole value is named."""
    if error.msg == "Extra data" and error.doc[error.pos :].strip() == ",":
        return "a comma stands after it; JSON Lines has none between lines, remove it"
    return str(error)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) == len(pairs):
        return row
    marked = RepeatedKeys(row)
    names = [name for name, _ in pairs]
    marked.repeated = next(name for name in names if names.count(name) > 1)
    return marked


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # `json.loads` would make one a line


def parse_json(path: Path, text: str) -> Any:
    """Parses the text of a JSON file as `parse_line`. Raises DataError where it is not JSON."""
    try:
        return parse_line(text)
    except ValueError as error:
        raise not_json(path, text, error) from None


def not_json(path: Path, text: str, error: ValueError) -> DataError:
    """The sentence for a file that is no JSON: what it is instead, where that is known."""
    if not text.strip():
        return DataError(f"{path} is empty; fetch it again")
    meaning = files.describe_head(text.encode(errors="replace")[:1024])
    return DataError(
        f"{path}: {meaning}" if meaning else f"{path} is not JSON ({error}); fetch it again"
    )


def text_problem(value: Any) -> str | None:
    """Says why a value is no text that can be encoded: another type, half a character, a NUL.

    >>> text_problem(3)
    'is the number 3, not text; put it in quotes or remove it'
    """
    if not isinstance(value, str):
        return f"is {json_type(value)}, not text; put it in quotes or remove it"
    if "\0" in value:
        return "holds a NUL character; remove it"
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            # JSON may write one half of a UTF-16 pair; no tokenizer or file takes it.
            half = ord(value[error.start])
            return (
                f"holds half a character (U+{half:04X} at place {error.start + 1}), as of an emoji "
                "that was cut; write it whole or remove it"
            )
    return None


def json_type(value: Any) -> str:
    """Names a JSON value in a sentence: `null`, `the number 3`, `a list`, `an object`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value!r}"
    names = {"str": "a text", "list": "a list", "dict": "an object"}
    return names.get(type(value).__name__, f"a {type(value).__name__}")


def printable(text: str) -> str:
    """Escapes what cannot be written as UTF-8, so that a message can show any name."""
    return text.encode("utf-8", "backslashreplace").decode()


def problem_lines(problems: Sequence[BadSample]) -> list[str]:
    """One line for each of the first problems, and how many more there are."""
    lines = [str(problem) for problem in problems[:PROBLEMS_SHOWN]]
    if len(problems) > PROBLEMS_SHOWN:
        lines.append(f"and {len(problems) - PROBLEMS_SHOWN:,} more")
    return lines
