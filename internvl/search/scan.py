"""Lists the photos of a folder, and reads them: content digest, date, and a square of pixels.

Imports no torch until a photo is decoded.
"""

import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from internvl.data.images import IMAGE_ENDINGS, decoder_errors, open_checked, read_rgb, size_of
from internvl.errors import BadImage, explain

if TYPE_CHECKING:
    from torch import Tensor

SETTINGS, TABLE = "index.json", "photos.db"
"""Files that make a folder an index."""

ENDINGS = (*IMAGE_ENDINGS, ".tif", ".tiff", ".avif")
"""Suffixes of photos, in lower case."""

FOREIGN = (".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw")
"""Suffixes of photos that are not read; a line counts them."""

MAX_BYTES = 1 << 30
"""Largest file that is read whole into memory."""

_EXIF, _TAKEN, _CHANGED = 0x8769, 0x9003, 0x0132  # tags: EXIF's own part, two dates
_DATE = re.compile(r"(\d{4}):(\d\d):(\d\d)[ T](\d\d):(\d\d):(\d\d)")


@dataclass(frozen=True)
class Entry:
    """A file that may be a photo."""

    path: str
    """Below the folder, with slashes."""
    size: int
    mtime_ns: int


@dataclass
class Scan:
    """Walks a folder of photos; notes what it cannot list."""

    folder: Path
    skip: Path
    """A folder that is not entered: the index itself."""
    problems: list[str] = field(default_factory=list)
    """One sentence each."""
    unlisted: list[str] = field(default_factory=list)
    """Paths of folders that could not be listed."""
    foreign: Counter[str] = field(default_factory=Counter)
    """Suffix -> files of `FOREIGN`."""

    def entries(self) -> Iterator[Entry]:
        """Yields the photos, without hidden files and folders; links to folders are not followed.

        Raises:
            OSError: the folder itself cannot be listed.
        """
        waiting = [self.folder]
        while waiting:
            folder = waiting.pop()
            try:
                with os.scandir(folder) as listed:
                    files = sorted(listed, key=lambda entry: entry.name)
            except OSError as error:
                if folder == self.folder:
                    raise
                self.problems.append(explain(error))
                self.unlisted.append(folder.relative_to(self.folder).as_posix())
                continue
            # Another index: its thumbnails would be found as photos.
            if folder != self.folder and {SETTINGS, TABLE} <= {file.name for file in files}:
                continue
            for file in files:
                if file.name.startswith("."):
                    continue
                if file.is_dir(follow_symlinks=False):
                    if Path(file.path) != self.skip:
                        waiting.append(Path(file.path))
                    continue
                entry = self._entry(file)
                if entry is not None:
                    yield entry

    def _entry(self, file: os.DirEntry[str]) -> Entry | None:
        suffix = os.path.splitext(file.name)[1].lower()
        if suffix in FOREIGN:
            self.foreign[suffix] += 1
        if suffix not in ENDINGS:
            return None
        path = Path(file.path).relative_to(self.folder).as_posix()
        try:
            path.encode()
            status = file.stat()
        except UnicodeEncodeError:
            shown = path.encode(errors="backslashreplace").decode()
            self.problems.append(f"{shown}: the name is not UTF-8; rename it")
            return None
        except OSError as error:  # a link to nowhere, or deleted meanwhile
            self.problems.append(explain(error))
            return None
        # A pipe would block its reader for ever.
        if not stat.S_ISREG(status.st_mode):
            return None
        return Entry(path, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class ReadPhoto:
    """A file that was read."""

    path: str
    size: int
    mtime_ns: int
    digest: bytes = b""
    taken: str = ""
    has_exif: int = 0
    width: int = 0
    height: int = 0
    pixels: "Tensor | None" = None
    """uint8 (3, S, S); None if its content is in the index, or cannot be read."""
    problem: str = ""
    """Why it cannot be read; empty if it can."""


def read_photo(
    folder: Path, path: str, image_size: int, is_indexed: Callable[[bytes], bool]
) -> ReadPhoto:
    """Reads a photo, and decodes it unless `is_indexed(digest)`.

    Args:
        image_size: side of the square (S), px.
    """
    size = mtime_ns = 0
    try:
        with open(folder / path, "rb") as file:
            # Of the opened file: another one may take its name meanwhile.
            status = os.fstat(file.fileno())
            size, mtime_ns = status.st_size, status.st_mtime_ns
            if size > MAX_BYTES:
                raise BadImage(f"{size / (1 << 30):.1f} GiB are too large for a photo")
            data = file.read()
        digest = blake2b(data, digest_size=16).digest()
        changed = _local_date(mtime_ns)
        if is_indexed(digest):
            return ReadPhoto(path, size, mtime_ns, digest, changed)
        with open_checked(data) as image:
            taken = _exif_date(image)
        rgb = upright(data)
        dates = (taken or changed, int(bool(taken)))
        # Here: an update without new photos needs no torch.
        from internvl.data.pairs import square

        pixels = square(rgb, image_size)
        return ReadPhoto(path, size, mtime_ns, digest, *dates, *size_of(rgb), pixels)
    except BadImage as error:
        return ReadPhoto(path, size, mtime_ns, problem=f"{folder / path}: {error}")
    except OSError as error:
        return ReadPhoto(path, size, mtime_ns, problem=explain(error))


def upright(image: bytes | Path) -> np.ndarray:
    """Decodes an image to RGB, turned as its EXIF says: uint8 (H, W, 3). Raises BadImage."""
    # As people see it: a photo on its side would be found by other words.
    return read_rgb(image, "apply")


def _local_date(mtime_ns: int) -> str:
    """Formats a file's time as local ISO date and time."""
    # Broken archives unpack files of the year 60056, which datetime has not.
    seconds = min(max(mtime_ns // 10**9, 0), 1 << 37)
    return datetime.fromtimestamp(seconds).isoformat()


def _exif_date(image: Image.Image) -> str:
    """Returns the date and time of an opened image's EXIF, ISO without a zone; "" without one."""
    try:
        with decoder_errors(""):
            exif = image.getexif()
            texts = (exif.get_ifd(_EXIF).get(_TAKEN), exif.get(_CHANGED))
    except BadImage:
        return ""
    for text in texts:
        matched = _DATE.match(text) if isinstance(text, str) else None
        if matched is not None:
            try:
                return datetime(*map(int, matched.groups())).isoformat()  # type: ignore[arg-type]
            except ValueError:  # cameras without a clock write zeros
                continue
    return ""
