"""Atomic files and folders, JSON and JSONL, the cache folder, and what an unreadable file is.

Files of a model folder are often not what they should be: a clone without Git LFS leaves pointers,
an interrupted download half a file or none, a proxy its error page. Imports nothing of the package
but its errors, so that every reader and writer may use it.
"""

import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from internvl.errors import ModelFolderError, UserError

_AGAIN = "download it again"
_CUT = f"it is truncated, {_AGAIN}"
# Cameras and editors write all of these; they follow "ftyp" at byte 4.
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
    # After the images: HEIC and AVIF begin with "ftyp" too.
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
    """Describes what a file really is and the remedy; None if nothing speaks against it.

    Raises:
        ModelFolderError: it cannot be opened at all.
    """
    return describe_head(_head(file))


def describe_media(head: bytes, noun: str) -> str | None:
    """As `describe`, for a file that cannot be read as an image or video (`noun`).

    Args:
        head: its first 1,024 bytes.
    """
    start = head.lstrip().lower()
    # Most SVG files begin as XML; _SIGNS would call them a server's error.
    if start.startswith(b"<?xml") and b"<svg" in start:
        start = b"<svg"
    for offset, sign, meaning in _MEDIA if noun == "video" else (*_MEDIA, *_VIDEOS):
        # Leading blanks are skipped for text only: a binary format's offset counts every byte.
        if head[offset:].startswith(sign) or (not offset and start.startswith(sign)):
            return meaning
    return describe_head(head)


def describe_head(head: bytes) -> str | None:
    """As `describe`, by the first 1,024 bytes of a file."""
    if not head:
        return f"empty (0 bytes): the download did not finish, {_AGAIN}"
    # Downloaders that reserve the space first leave zeros if they are interrupted.
    if not head.strip(b"\0"):
        return f"nothing but zero bytes where its content should begin: {_AGAIN}"
    return other_format(head)


def other_format(head: bytes) -> str | None:
    """Describes the format of a file by its first bytes if it is neither text nor weights."""
    start = head[:1024].lstrip().lower()
    return next((meaning for sign, meaning in _SIGNS if start.startswith(sign)), None)


def _head(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(1024)
    except OSError as error:
        raise unreadable(file, error) from error


def unreadable(file: Path, error: OSError) -> ModelFolderError:
    """Returns the error for a file that the operating system does not open."""
    if isinstance(error, FileNotFoundError):
        return ModelFolderError(f"{file}: missing, so this is not a complete model folder")
    reason = error.strerror or type(error).__name__
    return ModelFolderError(f"{file}: cannot be opened ({reason}); check what it is and its rights")


def read_object(file: Path) -> dict[str, Any]:
    """Reads a JSON object of a model folder, with or without a byte-order mark.

    Raises:
        ModelFolderError: missing, another kind of file, no JSON or no object; names the file.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise unreadable(file, error) from error
    except (ValueError, RecursionError) as error:  # JSON's and UTF-8's are ValueErrors
        # Only after JSON refused it: the first bytes alone do not tell JSON from other text.
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
    """Returns the error for a safetensors file that its reader refuses."""
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
    """Says where a safetensors file ends, if that is before the end that its header gives."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)  # the header's length in bytes, little-endian
        if len(start) < 8:
            return f"cannot be read (it ends after {size} bytes, within its header); {_CUT}"
        length = struct.unpack("<Q", start)[0]
        # Before reading: of a file of another format these 8 bytes may say exabytes.
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
    """Returns the first line of an exception's text, or its class name if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def read_run_json(path: Path, remedy: str) -> dict[str, Any]:
    """Reads the JSON object in a file that a run wrote.

    Args:
        remedy: what to do if the file was damaged since.

    Raises:
        UserError: it cannot be read, or holds something else; names the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); {remedy}") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, nested too deeply
        raise UserError(f"{path} is damaged ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (it holds no JSON object); {remedy}")
    return value


def read_numbers(path: Path, remedy: str) -> dict[str, float]:
    """As `read_run_json`, for a file of numbers by name."""
    numbers = read_run_json(path, remedy)
    for name, value in numbers.items():
        # bool is a subclass of int, and `true` is no score.
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{path} is damaged ({name!r} is no number); {remedy}")
    return numbers


def write_text(path: Path, text: str, *, fsync: bool = False) -> None:
    """Writes a text file atomically, see `atomic_file`.

    Raises:
        OSError: it could not be written (disk full, …); the error names `path`.
    """
    with names_file(path), atomic_file(path, fsync=fsync) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, indent: int | None = None) -> None:
    """Writes JSON in ASCII atomically.

    Raises:
        OSError: it could not be written; the error names `path`.
    """
    # ASCII: names of samples may hold lone surrogates, which UTF-8 cannot encode.
    write_text(path, json.dumps(value, indent=indent))


def write_lines(path: Path, lines: Iterable[str]) -> int:
    """Writes a text file, such as JSONL, atomically; returns the number of lines."""
    count = 0
    # Line by line: annotation files are larger than memory allows.
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(line + "\n")
            count += 1
    return count


@contextmanager
def names_file(path: Path) -> Iterator[None]:
    """Gives an OSError from inside (a full disk, say) the name of the file it was about.

    Raises:
        OSError: the same error with `path` as its filename, unless it names a file already.
    """
    try:
        yield
    except OSError as error:
        # write() of an open file raises without its name; open() and rename() give it.
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def atomic_file(path: Path, *, fsync: bool = False) -> Iterator[Path]:
    """Yields a temporary path that is renamed to `path` if the block ends without an error.

    A killed writer leaves the old file or none under `path`, never half of the new one. The
    parent folder is created.

    Args:
        fsync: flush to the disk before the rename, so that a power failure loses neither version.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _unique_partial(path)
    try:
        yield partial
        if fsync:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def complete_folder(path: Path, *, shared: bool = False, mode: int = 0o777) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `path` if the block ends without an error.

    `path` may be an empty folder; the block may remove one that is not.

    Args:
        shared: several processes may write the same folder at once; the first to finish wins, and
            the others' folders are removed.
        mode: permissions of the folder, less the umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A fixed name lets the next attempt remove what a killed one left, often gigabytes. Processes
    # that write at once would remove each other's.
    hidden = _unique_partial(path) if shared else path.with_name(f".{path.name}.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    # Inside it under its final name, which writers put into paths of their annotations.
    partial = hidden / path.name
    try:
        hidden.mkdir()
        partial.mkdir(mode=mode)
        yield partial
        # Some systems refuse to rename over an empty folder.
        with suppress(OSError):
            path.rmdir()
        try:
            partial.rename(path)
        except OSError:
            if not (shared and path.is_dir()):
                raise
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def remove_partials(folder: Path) -> None:
    """Removes what killed writers left in `folder`; nobody else may be writing there."""
    for partial in folder.glob(".*.partial"):
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink()


def _unique_partial(path: Path) -> Path:
    # In the same folder: a rename is atomic only within a file system. Random, not the process id,
    # which containers that share a disk often have in common; not `tempfile`, whose mode 0600
    # ignores the umask and would keep other users and web servers from reading the result.
    return path.with_name(f".{path.name}-{secrets.token_hex(4)}.partial")


def cache_folder() -> Path:
    """Returns `$XDG_CACHE_HOME/internvl`, else `~/.cache/internvl`."""
    root = os.environ.get("XDG_CACHE_HOME")  # an empty value counts as unset, by the XDG standard
    return (Path(root) if root else Path.home() / ".cache") / "internvl"
