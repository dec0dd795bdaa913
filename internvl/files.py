"""Atomic files and folders, JSON and JSONL, the cache folder, and formats of unreadable files.

Files of a model folder often have another content than their name says: Git LFS pointers after a
clone without LFS, half a file after an interrupted download, a proxy's error page. Imports nothing
of the package but its errors, so that every reader and writer may use it.
"""

import difflib
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
"""(first bytes, format and remedy) of files that are often met under another file's name."""

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
"""(offset, bytes there, format and remedy) of files given as images or videos that cannot be read
as such."""

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
"""Longest header that safetensors reads, in bytes."""


def describe(file: Path) -> str | None:
    """Returns the actual format of a file and the remedy; None if its start looks right.

    Raises:
        ModelFolderError: it cannot be opened at all.
    """
    return describe_head(_head(file))


def describe_media(head: bytes, noun: str) -> str | None:
    """Returns the actual format of a file that cannot be read as an image or video, or None.

    Args:
        head: its first 1,024 bytes.
        noun: "image" or "video", as which it was to be read.
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
    """As `describe`, from the first 1,024 bytes of a file."""
    if not head:
        return f"empty (0 bytes): the download did not finish, {_AGAIN}"
    # Downloaders that reserve space first leave zeros if interrupted.
    if not head.strip(b"\0"):
        return f"nothing but zero bytes where its content should begin: {_AGAIN}"
    return other_format(head)


def other_format(head: bytes) -> str | None:
    """Returns the format and remedy of a file that is neither UTF-8 text nor weights, or None."""
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


_OUTPUTS = ("runs", "work_dirs", "out", "results")
"""Folders of the guides that training, exports and evaluations write."""


def no_such_model(name: str | Path) -> str | None:
    """Returns why a name is no run, model or hub id; None if it exists or the hub may have it."""
    text, path = str(name), Path(name).expanduser()
    if path.suffix == ".pth" or path.exists():
        return None
    near: list[str] = []
    if path.parent.is_dir():
        siblings = sorted(p.name for p in path.parent.iterdir())
        near = difflib.get_close_matches(path.name, siblings, n=1)
    # The folder of the guides: no owner on the hub, from wherever it is named.
    if path.parent.name == "pretrained":
        hint = f"did you mean {path.parent / near[0]}? Or " if near else ""
        return (
            f"{text}: no such folder; {hint}fetch a release into it with `internvl models "
            f"{path.name} --download --to {text}`"
        )
    # Nor are those that runs and exports land in, which are not there before the first run.
    if path.parts[0] in _OUTPUTS and not path.parent.is_dir():
        return f"{text}: there is no such run or model; `internvl train RECIPE` writes runs"
    # What looks like a path is never asked of the hub: a typo would read as a network error.
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1:
        return (
            f"{text}: no such folder, and not a hub id of the form owner/name; "
            "`internvl models` lists the released models"
        )
    # A folder of this machine, such as runs/, is no owner on the hub.
    if not path.parent.is_dir():
        return None
    hint = f"did you mean {path.parent / near[0]}?" if near else f"`ls {path.parent}` shows others"
    return f"{text}: there is no such run or model; {hint}"


def read_yaml(file: Path) -> Any:
    """Reads a YAML file of the package's own data."""
    # Here: most readers of this module have no YAML.
    import yaml

    # libyaml's reader takes a tenth of the time; PyYAML is sometimes built without it.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(file.read_text(encoding="utf-8"), loader)


def read_object(file: Path) -> dict[str, Any]:
    """Reads a JSON object of a model folder, with or without a byte-order mark.

    Raises:
        ModelFolderError: missing, another format, no JSON or no object; names the file.
    """
    return _parse_object(file, _read_bytes(file))


class FolderReader:
    """Reads files of a folder by name, each at most once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._contents: dict[str, bytes | None] = {}
        self._objects: dict[str, dict[str, Any]] = {}

    def content(self, name: str) -> bytes | None:
        """Returns the bytes of a file; None if there is none. Raises ModelFolderError."""
        if name not in self._contents:
            file = self.folder / name
            self._contents[name] = _read_bytes(file) if file.is_file() else None
        return self._contents[name]

    def object(self, name: str) -> dict[str, Any]:
        """Returns the JSON object in a file; empty if there is no file. Raises as `read_object`."""
        # Parsed once too: a tokenizer.json of 10 MB takes longer to parse than to read.
        if name not in self._objects:
            content = self.content(name)
            self._objects[name] = (
                {} if content is None else _parse_object(self.folder / name, content)
            )
        return self._objects[name]


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise unreadable(file, error) from error


def _parse_object(file: Path, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        meaning = describe_head(content[:1024])
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
        # A safetensors file may begin with the same bytes, the length of its header; then the
        # header's own first byte is "{".
        if meaning is None and head.startswith(sign) and head[8:9] != b"{":
            meaning = f"{name}, not safetensors: give it its own name, or take the release's file"
    meaning = meaning or _cut_short(file)
    if meaning is None:
        meaning = f"cannot be read ({first_line(error)}); it is damaged, {_AGAIN}"
    return ModelFolderError(f"{file}: {meaning}")


def _cut_short(file: Path) -> str | None:
    """Returns a message if a safetensors file is shorter than its header says, else None."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        if len(start) < 8:
            return f"cannot be read (it ends after {size} bytes, within its header); {_CUT}"
        length = struct.unpack("<Q", start)[0]
        # Before reading: in a file of another format these 8 bytes may mean exabytes.
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
        return None
    if size < whole:
        return f"cannot be read (it ends after {size} of {whole} bytes); {_CUT}"
    return None


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's text, or its class name if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def pickle_problem(error: BaseException) -> str:
    """Returns why torch read no tensors from a pickle."""
    # Not torch's own words: they advise weights_only=False, which runs the code in the file.
    if "weights_only" in str(error):
        return "it is damaged, or holds code, which is never run"
    return first_line(error)


def read_run_json(path: Path, remedy: str) -> dict[str, Any]:
    """Reads the JSON object in a file that a run wrote.

    Args:
        remedy: advice for a file that was damaged since, which ends the message.

    Raises:
        UserError: it cannot be read, or holds something else; names the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (it holds no JSON object); {remedy}")
    return value


def read_numbers(path: Path, remedy: str, *, text_suffix: str | None = None) -> dict[str, Any]:
    """As `read_run_json`, for an object whose values are numbers.

    Args:
        text_suffix: end of the names whose value may be text.
    """
    values = read_run_json(path, remedy)
    for name, value in values.items():
        is_text = text_suffix is not None and name.endswith(text_suffix) and isinstance(value, str)
        # bool is a subclass of int, and `true` is no score.
        if not is_text and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"{path} is damaged ({name!r} is no number); {remedy}")
    return values


def write_text(path: Path, text: str, *, fsync: bool = False) -> None:
    """Writes a UTF-8 text file atomically (see `atomic_file`).

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
    """Adds the file's name to an OSError raised in the block, such as that of a full disk.

    Raises:
        OSError: the same error with `path` as its filename, unless it has one already.
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

    A killed writer leaves the old file or none at `path`, never half of the new one. The parent
    folder is created.

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
    # A fixed name lets the next attempt remove what a killed one left, often gigabytes; processes
    # that write at the same time would remove each other's folders.
    hidden = _unique_partial(path) if shared else path.with_name(f".{path.name}.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    # Under its final name already: writers put it into the paths of annotations.
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
    """Removes temporary files that killed writers left in `folder`; no process may be writing."""
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
    root = os.environ.get("XDG_CACHE_HOME")
    # The XDG standard treats an empty value as unset.
    return (Path(root) if root else Path.home() / ".cache") / "internvl"
