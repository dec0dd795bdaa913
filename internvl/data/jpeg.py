"""Decodes JPEG files by simplejpeg, if it is installed and equals Pillow bit for bit.

Both use libjpeg-turbo, but Pillow decodes through four bytes per pixel and buffers of 64 KiB.
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
    """Returns uint8 (H, W, 3) of a flawless gray or YCbCr file, None if Pillow must decode it."""
    simplejpeg = _checked_module()
    if simplejpeg is None:
        return None
    try:
        # CMYK and YCCK go to Pillow, which inverts what Adobe stores inverted.
        colors = simplejpeg.decode_jpeg_header(data)[2]
        return simplejpeg.decode_jpeg(data) if colors in ("Gray", "YCbCr") else None
    # Also raised if libjpeg-turbo only warns: Pillow decides whether such a file is an image.
    except (ValueError, MemoryError, RuntimeError, OverflowError):
        return None


@cache
def _checked_module() -> ModuleType | None:
    """Returns simplejpeg if it is installed and decodes `_probe_files` exactly like Pillow."""
    try:
        simplejpeg = importlib.import_module("simplejpeg")
    except ImportError:
        return None
    # The two wheels may bundle versions of libjpeg-turbo whose pixels differ: compare once.
    for data in _probe_files():
        with Image.open(io.BytesIO(data)) as image:
            expected = np.asarray(image.convert("RGB"))
        if not np.array_equal(simplejpeg.decode_jpeg(data), expected):
            logger.debug("simplejpeg and Pillow decode to different pixels, so Pillow decodes")
            return None
    return simplejpeg


def _probe_files() -> list[bytes]:
    """Encodes JPEG files of odd size: common chroma subsamplings, sequential and progressive."""
    noise = np.random.default_rng(0).integers(0, 256, (45, 67, 3), dtype=np.uint8)
    smooth = Image.fromarray(noise[:5, :7]).resize((67, 45))
    files = []
    for source in (Image.fromarray(noise), smooth):
        samplings = ("4:4:4", "4:2:2", "4:2:0")
        variants = [(source, {"subsampling": sampling}) for sampling in samplings]
        for image, options in (*variants, (source.convert("L"), {})):
            for progressive in (False, True):
                buffer = io.BytesIO()
                image.save(buffer, "JPEG", quality=80, progressive=progressive, **options)
                files.append(buffer.getvalue())
    return files
