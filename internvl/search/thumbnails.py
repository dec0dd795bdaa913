"""Thumbnails: made when they are first shown, kept by the content of their photos."""

import os
from io import BytesIO
from pathlib import Path

from PIL import Image

from internvl.data.images import open_small
from internvl.errors import BadImage
from internvl.files import atomic_file
from internvl.search.store import THUMBNAILS, PhotoRow, Store

SIDE = 320
"""Longer side of a thumbnail, px."""

_QUALITY = 82


def original(store: Store, photo: PhotoRow) -> Path:
    """Returns the path of a photo. Raises BadImage if the file is another one now, or gone."""
    path = store.root / photo.path
    try:
        status = path.stat()
    except OSError:
        raise BadImage(f"{path}: no longer there; run `internvl index` again") from None
    if (status.st_size, status.st_mtime_ns) != (photo.size, photo.mtime_ns):
        raise BadImage(f"{path}: has changed since; run `internvl index` again")
    return path


def thumbnail(store: Store, photo: PhotoRow) -> bytes:
    """Returns the JPEG bytes of a photo's thumbnail, and keeps them. Raises BadImage."""
    name = photo.digest.hex()
    # In folders by the first digits: file systems are slow with a million files in one.
    file = store.folder / THUMBNAILS / name[:2] / f"{name}.jpg"
    if file.is_file():
        return file.read_bytes()
    buffer = BytesIO()
    small = open_small(original(store, photo), SIDE, "apply")
    small.save(buffer, "JPEG", quality=_QUALITY)
    # An index that several people share may be read-only to them.
    if os.access(store.folder, os.W_OK):
        with atomic_file(file) as partial:
            partial.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def draw(image: Image.Image, columns: int) -> str:
    """Draws an image for a terminal of 24-bit colors: a character shows two pixels."""
    rows = max(1, round(columns * image.height / image.width / 2))
    pixels = image.resize((columns, 2 * rows), Image.Resampling.BICUBIC)
    lines = []
    for y in range(0, 2 * rows, 2):
        halves = [(pixels.getpixel((x, y)), pixels.getpixel((x, y + 1))) for x in range(columns)]
        lines.append(
            "".join(
                "\x1b[38;2;{};{};{};48;2;{};{};{}m▀".format(*upper, *lower)  # type: ignore[misc]
                for upper, lower in halves
            )
            + "\x1b[0m"
        )
    return "\n".join(lines)
