"""Index of an annotation file: line offsets, and groups of lines that show the same images.

Built in one pass and cached by content in a folder that may be deleted at any time. The arrays are
memory-mapped: ranks and workers share them, and no line stays in memory.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from internvl import log
from internvl.data import json_rows
from internvl.data.texts import printable
from internvl.errors import DataError
from internvl.files import cache_folder, complete_folder

_LAYOUT = b"3"  # raise when the arrays change for the same file
_CHUNK = 1 << 25  # bytes read at once
_KEYS = (b'"image', b'"video')
_MEDIA = re.compile(rb'"(?:image|video)s?"\s*:\s*(\[[^\]]*\]|"(?:[^"\\]|\\.)*")')


def index_folder() -> Path:
    """Returns `$XDG_CACHE_HOME/internvl/index`, else `~/.cache/internvl/index`."""
    return cache_folder() / "index"


class LineIndex:
    """Random access to the lines of a file.

    `starts` is int64 (lines + 1,), byte offsets; `groups` int32 (lines,), equal for lines with the
    same images. Both are mapped from `folder`. Blank lines at the end of the file are no lines of
    it: they have offsets, but no group.
    """

    def __init__(self, path: Path, folder: Path, digest: str) -> None:
        """
        Args:
            digest: `digests_of` the file's lines, without blank ones at its end.
        """
        self.path = path
        self.folder = folder
        self.digest = digest

    # Two paths and a digest: workers map the arrays themselves instead of copying them.
    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "folder": self.folder, "digest": self.digest}

    @cached_property
    def starts(self) -> np.ndarray:
        return np.load(self.folder / "starts.npy", mmap_mode="r")

    @cached_property
    def groups(self) -> np.ndarray:
        return np.load(self.folder / "groups.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def size(self) -> int:
        """Bytes of the lines."""
        return int(self.starts[len(self)])

    def lines(self, indices: Sequence[int]) -> Iterator[bytes]:
        """Yields the lines at `indices`, in that order, line ends included.

        Raises:
            DataError: the file has another size than when it was indexed.
        """
        with self.path.open("rb") as file:
            # Offsets into another file would cut lines anywhere. Its size is the cheapest sign.
            if os.fstat(file.fileno()).st_size != self.starts[-1]:
                raise DataError(f"{self.path} was changed while it is read; start again")
            for index in indices:
                file.seek(int(self.starts[index]))
                yield file.read(int(self.starts[index + 1] - self.starts[index]))


def index_lines(path: Path, cache: Path | None = None) -> LineIndex:
    """Indexes a JSONL file, or takes the index from the cache if its content is in it.

    Raises:
        OSError: the file cannot be read.
    """
    content, digest = digests_of(path)
    folder = (cache or index_folder()) / f"{content[:32]}-{_LAYOUT.decode()}"
    if not folder.is_dir():
        starts, groups = _scan(path)
        with new_entry(folder) as partial:
            np.save(partial / "starts.npy", starts)
            np.save(partial / "groups.npy", groups)
        log.get_logger().info("%s: %s lines indexed in %s", path, f"{len(groups):,}", folder)
    index = LineIndex(path, folder, digest)
    # A line that is appended after blank ones, or in their place, makes the file longer, not other.
    if index.size < index.starts[-1]:
        index.digest = digests_of(path, index.size)[1]
    return index


def digest_of(path: Path, size: int | None = None, without: bytes = b"") -> str:
    """Returns the SHA-256 hex digest of a file's first `size` bytes (None: all).

    Args:
        without: bytes removed from every line first.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    # Whole lines, because a chunk could end within `without`.
    pieces = _whole_lines(path, size) if without else _chunks(path, size)
    for piece in pieces:
        digest.update(piece.replace(without, b"") if without else piece)
    return digest.hexdigest()


def digests_of(path: Path, size: int | None = None) -> tuple[str, str]:
    """Returns SHA-256 hex digests of a file's first `size` bytes (None: all) and of its lines.

    The second ignores a byte-order mark and the kind of line ends, which editors and `git` change
    without changing a sample.

    Raises:
        OSError: the file cannot be read.
    """
    lines = hashlib.sha256()
    whole = None  # made at the first difference, so that most files are hashed once
    rest = last = b""
    for chunk_index, chunk in enumerate(_chunks(path, size)):
        text = rest + (chunk if chunk_index else chunk.removeprefix(json_rows.BOM))
        rest = b"\r" if text.endswith(b"\r") else b""  # its `\n` may begin the next chunk
        if b"\r" in text:  # ten times as fast to search as the pair
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
    """Writes rows as an indexed JSONL file in the cache, unless `key` is already there.

    A row that UTF-8 JSON cannot hold is replaced by one with the reason under `bad`.

    Args:
        name: the source's name, for the log.
        key: pieces of the content that the rows depend on.
        rows: yields the rows in order; `where` names a row's place in its file.
    """
    return write_once(name, key, lambda: map(_line, rows()))


_ENCODER = json.JSONEncoder(ensure_ascii=False)  # `json.dumps` would make one for every row


def _line(row: dict[str, Any]) -> bytes:
    try:
        return _ENCODER.encode(row).encode()
    except UnicodeEncodeError:
        # Member names of a tar are not always UTF-8; the sample itself may be good.
        row = row | {"where": printable(row["where"])}
        problem = next(json_rows.lone_surrogates(row), None)
    except RecursionError:
        problem = json_rows.TOO_DEEP
    row = row if problem is None else {"where": row["where"], "bad": problem}
    return _ENCODER.encode(row).encode()


def write_once(name: str, key: Iterable[bytes], lines: Callable[[], Iterable[bytes]]) -> LineIndex:
    """Writes lines as an indexed file in the cache, unless `key` is already there.

    Args:
        name: the source's name, for the log.
        key: pieces of the content that the lines depend on.
        lines: yields the lines in order, without line ends.
    """
    digest = hashlib.sha256(_LAYOUT)
    for piece in key:
        digest.update(piece)
    folder = index_folder() / f"rows-{digest.hexdigest()[:32]}"
    if not folder.is_dir():
        with (
            new_entry(folder) as partial,
            (partial / "rows.jsonl").open("wb") as file,
        ):
            for line in lines():
                file.write(line + b"\n")
        log.get_logger().info("%s: read into %s", name, folder)
    return index_lines(folder / "rows.jsonl")


def file_content(path: Path) -> Iterator[bytes]:
    """Yields a file's content in pieces, as a key of `convert_once`."""
    yield from _chunks(path)


def new_entry(folder: Path) -> AbstractContextManager[Path]:
    """Returns `files.complete_folder` for an entry of the cache."""
    # Ranks and workers open the same file at the same time. Closed to other users: rows are copies
    # of annotations that they may not be allowed to read.
    return complete_folder(folder, shared=True, mode=0o700)


def _chunks(path: Path, size: int | None = None) -> Iterator[bytes]:
    """Yields the first `size` bytes of a file (None: all) in chunks."""
    left = sys.maxsize if size is None else size
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(_CHUNK, left))):
            left -= len(chunk)
            yield chunk


def _whole_lines(path: Path, size: int | None = None) -> Iterator[bytes]:
    """Yields the same in pieces that end with a line."""
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
    """Scans a file; returns its (starts, groups), see `LineIndex`."""
    ends, keys = [np.zeros(1, dtype=np.int64)], [np.zeros(0, dtype=np.uint64)]
    offset = 0
    # In NumPy, not line by line in Python: files have millions of lines.
    for piece in _whole_lines(path):
        local = np.flatnonzero(np.frombuffer(piece, dtype=np.uint8) == 10).astype(np.int64) + 1
        if not piece.endswith(b"\n"):
            local = np.append(local, len(piece))
        ends.append(local + offset)
        keys.append(_media_keys(piece, local))
        offset += len(piece)
    starts, media = np.concatenate(ends), np.concatenate(keys)
    return starts, _dense(media[: _without_blank_end(path, starts)])


def _without_blank_end(path: Path, starts: np.ndarray) -> int:
    """Returns the number of lines up to the last one with text."""
    count = len(starts) - 1
    with path.open("rb") as file:
        while count:
            file.seek(int(starts[count - 1]))
            if not json_rows.is_blank(file.read(int(starts[count] - starts[count - 1]))):
                break
            count -= 1
    return count


def _media_keys(piece: bytes, ends: np.ndarray) -> np.ndarray:
    """Returns uint64 (lines,): a hash of the media that a line names, 0 if it names none."""
    # Of the raw JSON text: a path in another spelling is only not grouped, which costs no sample.
    positions: list[int] = []
    digests: list[bytes] = []
    for key in _KEYS:
        position = piece.find(key)
        while position >= 0:
            match = _MEDIA.match(piece, position)
            if match:
                positions.append(position)
                digests.append(hashlib.blake2b(key + match[1], digest_size=8).digest())
            position = piece.find(key, position + 6)
    keys = np.zeros(len(ends), dtype=np.uint64)
    lines = np.searchsorted(ends, np.asarray(positions, dtype=np.int64), side="right")
    # A line may name several media: sums, because `keys[lines] += …` adds one of them only.
    np.add.at(keys, lines, np.frombuffer(b"".join(digests), dtype=np.uint64))
    return keys


def _dense(keys: np.ndarray) -> np.ndarray:
    """Returns int32 group numbers from 0 on, equal for equal keys; each 0 is its own group."""
    groups = np.empty(len(keys), dtype=np.int32)
    named = keys != 0
    unique, inverse = np.unique(keys[named], return_inverse=True)
    groups[named] = inverse
    groups[~named] = np.arange(int((~named).sum()), dtype=np.int32) + len(unique)
    return groups
