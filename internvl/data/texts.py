"""Text files read as UTF-8 or refused with a remedy, and checks of single strings."""

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internvl.errors import BadSample, DataError

PROBLEMS_SHOWN = 20
"""Problems that a message lists; the others are only counted."""

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
    if content.startswith(_UTF16):  # before decoding, which would only say "not UTF-8"
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
    # A clone without git-lfs has these few lines where the data belong.
    if text.startswith(_LFS_POINTER):
        raise DataError(f"{path} is a pointer of Git LFS, not the file; run `git lfs pull`")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def text_problem(value: Any) -> str | None:
    """Returns why a value is no encodable text (other type, NUL, lone surrogate), else None.

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
    """Returns a noun phrase for a JSON value: `null`, `the number 3`, `a list`, `an object`."""
    if value is None:
        return "null"
    if isinstance(value, bool):  # before numbers: Python's bool is an int
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value!r}"
    names = {"str": "a text", "list": "a list", "dict": "an object"}
    return names.get(type(value).__name__, f"a {type(value).__name__}")


def printable(text: str) -> str:
    """Returns `text` with lone surrogates escaped, so that any file or terminal takes it."""
    return text.encode("utf-8", "backslashreplace").decode()


def problem_lines(problems: Sequence[BadSample]) -> list[str]:
    """Returns a line for each of the first PROBLEMS_SHOWN problems, then the count of the rest."""
    lines = [str(problem) for problem in problems[:PROBLEMS_SHOWN]]
    if len(problems) > PROBLEMS_SHOWN:
        lines.append(f"and {len(problems) - PROBLEMS_SHOWN:,} more")
    return lines
