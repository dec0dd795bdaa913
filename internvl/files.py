"""What a file really is, whatever its name says: the sentence for files that cannot be read.

Files of a model folder are often not what they should be: a clone without Git LFS leaves pointers,
an interrupted download half a file or none, a proxy its error page. Imports nothing of the package
but its error, so that every reader may use it.
"""

import json
import struct
from pathlib import Path
from typing import Any

from internvl.errors import ModelFolderError

_AGAIN = "download it again"
_CUT = f"it is truncated, {_AGAIN}"
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_SIGNS: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs.github.com",
        "a Git LFS pointer instead of the file: run `git lfs pull` in its folder",
    ),
    (b"/annex/objects/", "a git-annex pointer instead of the file: run `git annex get` on it"),
    (b"<!doctype html", f"a web page, such as a login or an error: {_AGAIN}"),
    (b"<html", f"a web page, such as a login or an error: {_AGAIN}"),
    (b"<?xml", f"an XML answer, such as a server's error: {_AGAIN}"),
    (b"\xff\xfe", "text in UTF-16: save it as UTF-8"),
    (b"\xfe\xff", "text in UTF-16: save it as UTF-8"),
    (b"\x1f\x8b", "compressed by gzip: unpack it (`gunzip`)"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it"),
)
"""How files begin that are often found under another one's name; what they are and the remedy."""

_MEDIA: tuple[tuple[int, bytes, str], ...] = (
    *((4, b"ftyp" + brand, "a HEIC image: convert it to JPEG or PNG") for brand in _HEIC_BRANDS),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL image: convert it to JPEG or PNG"),
    (0, b"\xff\x0a", "a JPEG XL image: convert it to JPEG or PNG"),
    (4, b"ftypavif", "an AVIF image: convert it to JPEG or PNG"),
    (0, b"%PDF", "a PDF document: save its page as JPEG or PNG"),
    (0, b"<svg", "an SVG drawing: save it as PNG"),
    (0, b"{", "JSON, such as a server's error: download it again"),
    (0, b"data:", "a `data:` address as text: decode its base64 part"),
    (0, b"PK\x03\x04", "a zip archive: unpack it"),
)
"""Where and how files begin that are met as images and videos and cannot be read as such."""

_VIDEOS: tuple[tuple[int, bytes, str], ...] = (
    (4, b"ftyp", "a video (MP4 or QuickTime), not an image: name it as a video"),
    (0, b"\x1aE\xdf\xa3", "a video (Matroska or WebM), not an image: name it as a video"),
)

_BINARY: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive, such as a PyTorch file (.bin, .pth)"),
    (b"\x80", "a pickle, such as an old PyTorch file (.bin, .pth)"),
)
_HEADER_LIMIT = 100_000_000
"""Bytes of the longest header that safetensors reads."""


def describe(file: Path) -> str | None:
    """What a file really is and what to do about it; None where nothing is known against it.

    Raises:
        ModelFolderError: it cannot be opened at all.
    """
    return describe_head(_head(file))


def describe_media(head: bytes, noun: str) -> str | None:
    """What a file that cannot be read as an image or video (`noun`) really is, as `describe`.

    Args:
        head: its first 1,024 bytes.
    """
    start = head.lstrip().lower()
    if start.startswith(b"<?xml") and b"<svg" in start:
        start = b"<svg"
    for place, sign, meaning in _MEDIA if noun == "video" else (*_MEDIA, *_VIDEOS):
        if head[place:].startswith(sign) or (not place and start.startswith(sign)):
            return meaning
    return describe_head(head)


def describe_head(head: bytes) -> str | None:
    """`describe` by the first 1,024 bytes of a file."""
    if not head:
        return f"empty (0 bytes): the download did not finish, {_AGAIN}"
    if not head.strip(b"\0"):
        return f"nothing but zero bytes where its content should begin: {_AGAIN}"
    return other_format(head)


def other_format(head: bytes) -> str | None:
    """What a file that begins so is instead of text or weights, and what to do about it."""
    start = head[:1024].lstrip().lower()
    return next((meaning for sign, meaning in _SIGNS if start.startswith(sign)), None)


def _head(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(1024)
    except OSError as error:
        raise unreadable(file, error) from error


def unreadable(file: Path, error: OSError) -> ModelFolderError:
    """The sentence for a file that the operating system does not open."""
    if isinstance(error, FileNotFoundError):
        return ModelFolderError(f"{file}: missing, so this is not a complete model folder")
    reason = error.strerror or type(error).__name__
    return ModelFolderError(f"{file}: cannot be opened ({reason}); check what it is and its rights")


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object of a model folder, with or without a byte-order mark.

    Raises:
        ModelFolderError: missing, another kind of file, no JSON or no object; names the file.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise unreadable(file, error) from error
    except (ValueError, RecursionError) as error:  # JSON's and UTF-8's are ValueErrors
        meaning = describe(file)
        raise ModelFolderError(
            f"{file}: {meaning}"
            if meaning
            else f"{file}: not JSON ({first_line(error)}); copy it again from the release"
        ) from error
    if not isinstance(value, dict):
        raise ModelFolderError(
            f"{file}: expected an object, found {type(value).__name__}; copy it again from the "
            "release"
        )
    return value


def explain_safetensors(file: Path, error: Exception) -> ModelFolderError:
    """The sentence for a safetensors file that its reader refuses."""
    meaning = describe(file)
    head = _head(file)
    for sign, name in _BINARY:
        # A header's length may begin with any byte, so that only what a header cannot be counts.
        if meaning is None and head.startswith(sign) and head[8:9] != b"{":
            meaning = f"{name}, not safetensors: give it its own name, or take the release's file"
    meaning = meaning or _cut_short(file)
    if meaning is None:
        meaning = f"cannot be read ({first_line(error)}); it is damaged, {_AGAIN}"
    return ModelFolderError(f"{file}: {meaning}")


def _cut_short(file: Path) -> str | None:
    """Whether a safetensors file ends before the end that its own header gives."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        if len(start) < 8:
            return f"cannot be read (it ends after {size} bytes, within its header); {_CUT}"
        length = struct.unpack("<Q", start)[0]
        if length > _HEADER_LIMIT:
            return f"not a safetensors file: copy it again from the release, or {_AGAIN}"
        if size < 8 + length:
            return f"cannot be read (it ends after {size} bytes, within its header); {_CUT}"
        text = opened.read(length)
    try:
        header = json.loads(text)
        ends = [value["data_offsets"][1] for name, value in header.items() if name[:2] != "__"]
        whole = 8 + length + max(ends)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return None  # the reader's own words are the better ones
    if size < whole:
        return f"cannot be read (it ends after {size} of {whole} bytes); {_CUT}"
    return None


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its name where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
