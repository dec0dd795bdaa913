"""Where the lines of an annotation file start, and which lines show the same images.

Built once in a pass over the file and kept, by its content, in a cache folder that may be deleted
at any time. The arrays are memory-mapped: ranks and workers share them, and no line is held.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from internvl import log
from internvl.data import json_rows
from internvl.data.texts import printable
from internvl.errors import DataError

_LAYOUT = b"2"  # raise when the arrays change for the same file
_CHUNK = 1 << 25  # bytes read at once
_KEYS = (b'"image', b'"video')
_MEDIA = re.compile(rb'"(?:image|video)s?"\s*:\s*(\[[^\]]*\]|"(?:[^"\\]|\\.)*")')


def cache_folder() -> Path:
    """Where indexes lie: `$XDG_CACHE_HOME/internvl/index`, else `~/.cache/internvl/index`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "internvl" / "index"


class LineIndex:
    """Random access to the lines of a file.

    `starts` is int64 (lines + 1,), `groups` int32 (lines,): the same number for lines with the
    same images. Both are mapped from `folder`; a pickled index is two paths and a digest.
    """

    def __init__(self, path: Path, folder: Path, digest: str) -> None:
        """
        Args:
            digest: `digests_of` the file's lines.
        """
        self.path = path
        self.folder = folder
        self.digest = digest

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "folder": self.folder, "digest": self.digest}

    @cached_property
    def starts(self) -> np.ndarray:
        return np.load(self.folder / "starts.npy", mmap_mode="r")

    @cached_property
    def groups(self) -> np.ndarray:
        return np.load(self.folder / "groups.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.starts) - 1

    def lines(self, indices: Sequence[int]) -> Iterator[bytes]:
        """Some lines, in the order asked for, line ends included.

        Raises:
            DataError: the file has another size than when it was indexed.
        """
        with self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != self.starts[-1]:
                raise DataError(f"{self.path} was changed while it is read; start again")
            for index in indices:
                file.seek(int(self.starts[index]))
                yield file.read(int(self.starts[index + 1] - self.starts[index]))


def index_lines(path: Path, cache: Path | None = None) -> LineIndex:
    """The index of a JSONL file, from the cache where its content is known.

    Raises:
        OSError: the file cannot be read.
    """
    content, digest = digests_of(path)
    folder = (cache or cache_folder()) / f"{content[:32]}-{_LAYOUT.decode()}"
    if not folder.is_dir():
        starts, groups = _scan(path)
        with complete_or_absent(folder) as partial:
            np.save(partial / "starts.npy", starts)
            np.save(partial / "groups.npy", groups)
        log.get_logger().info("%s: %s lines indexed in %s", path, f"{len(groups):,}", folder)
    return LineIndex(path, folder, digest)


def digest_of(path: Path, size: int | None = None, without: bytes = b"") -> str:
    """SHA-256 of a file's first `size` bytes (None: all), in hexadecimal digits.

    Args:
        without: left out wherever it stands in a line.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    pieces = _whole_lines(path, size) if without else _chunks(path, size)
    for piece in pieces:
        digest.update(piece.replace(without, b"") if without else piece)
    return digest.hexdigest()


def digests_of(path: Path, size: int | None = None) -> tuple[str, str]:
    """SHA-256 of a file's first `size` bytes (None: all), and of its lines, in hexadecimal digits.

    The lines are digested as if each had the end `\\n` and no byte-order mark came first, as they
    are the same samples after an editor or `git` wrote them with others.

    Raises:
        OSError: the file cannot be read.
    """
    lines = hashlib.sha256()
    whole = None  # apart from the first difference on, so that most files are digested once
    rest = last = b""
    for number, chunk in enumerate(_chunks(path, size)):
        text = rest + (chunk if number else chunk.removeprefix(json_rows.BOM))
        rest = b"\r" if text.endswith(b"\r") else b""  # its `\n` may begin the next chunk
        if b"\r" in text:  # ten times as fast to look for as both
            text = text.removesuffix(rest).replace(b"\r\n", b"\n")
        if whole is None and text != chunk:
            whole = lines.copy()
        if whole is not None:
            whole.update(chunk)
        lines.update(text)
        last = text[-1:] or last
    whole = whole or lines.copy()
    if last + rest not in (b"", b"\n"):
        lines.update(b"\n")
    return whole.hexdigest(), lines.hexdigest()


def convert_once(
    name: str, key: Iterable[bytes], rows: Callable[[], Iterator[dict[str, Any]]]
) -> LineIndex:
    """Rows of another form as an indexed JSONL file in the cache, written where `key` is new.

    A row that JSON in UTF-8 cannot hold becomes one that says so under `bad`.

    Args:
        name: what is converted, for the log.
        key: pieces of the content that the rows depend on.
        rows: makes the rows, in order; `where` says what a row was in the file.
    """
    return write_once(name, key, lambda: map(_line, rows()))


_ENCODER = json.JSONEncoder(ensure_ascii=False)  # `json.dumps` would make one for every row


def _line(row: dict[str, Any]) -> bytes:
    try:
        return _ENCODER.encode(row).encode()
    except UnicodeEncodeError:
        # Names of a tar's members are not always UTF-8; the sample may be a good one.
        row = row | {"where": printable(row["where"])}
        why = next(json_rows.lone_surrogates(row), None)
    except RecursionError:
        why = json_rows.TOO_DEEP
    row = row if why is None else {"where": row["where"], "bad": why}
    return _ENCODER.encode(row).encode()


def write_once(name: str, key: Iterable[bytes], lines: Callable[[], Iterable[bytes]]) -> LineIndex:
    """Lines made of a file of another form, indexed in the cache, written where `key` is new.

    Args:
        name: what is converted, for the log.
        key: pieces of the content that the lines depend on.
        lines: makes the lines, in order, without their ends.
    """
    digest = hashlib.sha256(_LAYOUT)
    for piece in key:
        digest.update(piece)
    folder = cache_folder() / f"rows-{digest.hexdigest()[:32]}"
    if not folder.is_dir():
        with (
            complete_or_absent(folder) as partial,
            (partial / "rows.jsonl").open("wb") as file,
        ):
            for line in lines():
                file.write(line + b"\n")
        log.get_logger().info("%s: read into %s", name, folder)
    return index_lines(folder / "rows.jsonl")


def file_content(path: Path) -> Iterator[bytes]:
    """A file's content as a key of `convert_once`."""
    yield from _chunks(path)


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """A folder written beside its place and moved there when the block ends without an error.

    Several processes may make the same one; the first to finish wins.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield partial
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _chunks(path: Path, size: int | None = None) -> Iterator[bytes]:
    """The first `size` bytes of a file (None: all), in pieces."""
    left = sys.maxsize if size is None else size
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(_CHUNK, left))):
            left -= len(chunk)
            yield chunk


def _whole_lines(path: Path, size: int | None = None) -> Iterator[bytes]:
    """The same in pieces that end with a line."""
    rest = b""
    for chunk in _chunks(path, size):
        cut = chunk.rfind(b"\n") + 1
        if cut:
            yield rest + chunk[:cut]
            rest = chunk[cut:]
        else:
            rest += chunk
    if rest:
        yield rest


def _scan(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(starts, groups) of a file."""
    ends, keys = [np.zeros(1, dtype=np.int64)], [np.zeros(0, dtype=np.uint64)]
    offset = 0
    for piece in _whole_lines(path):
        local = np.flatnonzero(np.frombuffer(piece, dtype=np.uint8) == 10).astype(np.int64) + 1
        if not piece.endswith(b"\n"):
            local = np.append(local, len(piece))
        ends.append(local + offset)
        keys.append(_media_keys(piece, local))
        offset += len(piece)
    return np.concatenate(ends), _dense(np.concatenate(keys))


def _media_keys(piece: bytes, ends: np.ndarray) -> np.ndarray:
    """uint64 (lines,): a number made of the media that a line names, 0 where it names none.

    The text between two quotes is taken as it stands: a line that spells the same path in another
    way gets another number, which only costs the saving.
    """
    places: list[int] = []
    digests: list[bytes] = []
    for key in _KEYS:
        place = piece.find(key)
        while place >= 0:
            match = _MEDIA.match(piece, place)
            if match:
                places.append(place)
                digests.append(hashlib.blake2b(key + match[1], digest_size=8).digest())
            place = piece.find(key, place + 6)
    keys = np.zeros(len(ends), dtype=np.uint64)
    lines = np.searchsorted(ends, np.asarray(places, dtype=np.int64), side="right")
    np.add.at(keys, lines, np.frombuffer(b"".join(digests), dtype=np.uint64))
    return keys


def _dense(keys: np.ndarray) -> np.ndarray:
    """int32: numbers from 0 on, equal where keys are; every 0 gets one of its own."""
    groups = np.empty(len(keys), dtype=np.int32)
    named = keys != 0
    unique, inverse = np.unique(keys[named], return_inverse=True)
    groups[named] = inverse
    groups[~named] = np.arange(int((~named).sum()), dtype=np.int32) + len(unique)
    return groups
