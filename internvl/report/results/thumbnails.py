"""Small copies of images, so that a page stays small however large a data set's images are."""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from internvl.data.images import Rgb, as_rgb, open_small
from internvl.errors import BadImage
from internvl.report.results.items import item_of, shown

_SIDE = 360
"""Longest side, px: twice what a card shows, for dense screens."""
_QUALITY = 80
MOST_IMAGES = 4
"""Images of a question that are shown."""


@lru_cache(maxsize=512)
def thumbnail(path: str) -> tuple[bytes, tuple[int, int]] | None:
    """Returns a small JPEG of an image file and its (width, height); None if it cannot be read.

    The data may have moved since the evaluation: a page is made without such an image.
    """
    try:
        return _encoded(open_small(path, _SIDE))
    except BadImage:
        return None


def _encoded(image: Image.Image) -> tuple[bytes, tuple[int, int]]:
    # `thumbnail` changes its image, and never enlarges it.
    small = image.copy()
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue(), small.size


def with_thumbnails(
    rows: Sequence[Mapping[str, Any]], load: Callable[[int], Sequence[Any]], folder: Path
) -> list[dict[str, Any]]:
    """Saves small copies of images that are no files, of the rows that a page shows.

    Args:
        load: index of a row -> its images in any form; those of a row with paths are not asked.
        folder: is created; named by the rows' `thumbnails`, from the folder above it.

    Returns:
        The rows, some of them with `thumbnails`.
    """
    items = {
        index: item_of(row)
        for index, row in enumerate(rows)
        if not ("reason" in row and "sample" in row)
    }
    # The same choice that the page makes later.
    chosen = {id(item) for some in shown([*items.values()]) for item in some}
    changed = [dict(row) for row in rows]
    for index, item in items.items():
        # Decoding all of a set's images would take longer than scoring it.
        if id(item) not in chosen or item.images:
            continue
        names = []
        for position, rgb in enumerate(_decoded(load, index)):
            small = Image.fromarray(rgb) if isinstance(rgb, np.ndarray) else rgb
            file = folder / f"{index}-{position}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(_encoded(small)[0])
            names.append(f"{folder.name}/{file.name}")
        changed[index] |= {"thumbnails": names} if names else {}
    return changed


def _decoded(load: Callable[[int], Sequence[Any]], index: int) -> list[Rgb]:
    try:
        return [as_rgb(image) for image in load(index)[:MOST_IMAGES]]
    except BadImage:
        # It could be read when it was asked about; the answers are worth more than the page.
        return []
