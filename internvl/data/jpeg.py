"""JPEG files to RGB arrays by simplejpeg, where that is installed and gives Pillow's pixels.

Both decode with libjpeg-turbo, but Pillow goes through four bytes a pixel and pieces of 64 KiB.
"""

import importlib
import io
import logging
from functools import cache
from types import ModuleType

import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)


def decode(data: bytes) -> np.ndarray | None:
    """uint8 (H, W, 3) of a flawless JPEG file in gray or YCbCr, or None: Pillow has to read it."""
    simplejpeg = _checked()
    if simplejpeg is None:
        return None
    try:
        colors = simplejpeg.decode_jpeg_header(data)[2]
        return simplejpeg.decode_jpeg(data) if colors in ("Gray", "YCbCr") else None
    except (
        ValueError,
        MemoryError,
        RuntimeError,
        OverflowError,
    ):  # also where libjpeg-turbo only warns
        return None


@cache
def _checked() -> ModuleType | None:
    """simplejpeg, if it is there and decodes small images as the Pillow that is installed."""
    try:
        simplejpeg = importlib.import_module("simplejpeg")
    except ImportError:
        return None
    for data in _images():
        with Image.open(io.BytesIO(data)) as image:
            wanted = np.asarray(image.convert("RGB"))
        if not np.array_equal(simplejpeg.decode_jpeg(data), wanted):
            logger.debug("simplejpeg decodes in another way than Pillow, so Pillow decodes")
            return None
    return simplejpeg


def _images() -> list[bytes]:
    """Files of every common sampling of colour, sequential and progressive, of odd sizes."""
    noise = np.random.default_rng(0).integers(0, 256, (45, 67, 3), dtype=np.uint8)
    smooth = Image.fromarray(noise[:5, :7]).resize((67, 45))
    files = []
    for source in (Image.fromarray(noise), smooth):
        kinds = [(source, {"subsampling": each}) for each in ("4:4:4", "4:2:2", "4:2:0")]
        for image, options in (*kinds, (source.convert("L"), {})):
            for progressive in (False, True):
                buffer = io.BytesIO()
                image.save(buffer, "JPEG", quality=80, progressive=progressive, **options)
                files.append(buffer.getvalue())
    return files
