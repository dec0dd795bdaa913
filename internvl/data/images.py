"""Image files to RGB pictures. Images are untrusted: their size is limited before decoding."""

import io
import os
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 178_956_970
"""Largest picture that is decoded (Pillow's own error limit): 512 MiB as RGB."""


class BadImage(ValueError):
    """A picture that cannot be read: the reason, in words a user can act on."""


def open_rgb(source: str | Path | bytes) -> Image.Image:
    """The picture in a file (or its bytes) as RGB, size (W, H).

    As the original: `convert("RGB")` (palette and alpha flattened, first frame of an animation),
    EXIF orientation not applied. Unlike it, a truncated file is an error.

    Raises:
        BadImage: missing, empty, no picture, truncated, or more than MAX_PIXELS pixels.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns from half the limit on; the limit itself is checked below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise BadImage(_too_large(width * height))
                return image.convert("RGB")
    except FileNotFoundError:
        raise BadImage(f"there is no image {source!s}") from None
    except Image.DecompressionBombError:
        raise BadImage(_too_large(None)) from None
    except UnidentifiedImageError:
        empty = not isinstance(source, bytes) and os.path.getsize(source) == 0
        what = "the image file is empty" if empty else "not an image Pillow knows"
        raise BadImage(f"{what}; replace the file") from None
    except (OSError, SyntaxError, ValueError, MemoryError) as error:
        if isinstance(error, BadImage):
            raise
        raise BadImage(f"the image cannot be decoded ({error}); replace the file") from None


def _too_large(pixels: int | None) -> str:
    found = "the image" if pixels is None else f"the image has {pixels:,} pixels and"
    return f"{found} exceeds the limit of {MAX_PIXELS:,} pixels; shrink the file"


def join_inside(root: Path, path: str) -> str:
    """`root / path`, which must stay inside `root` (annotation files are untrusted too).

    Raises BadImage otherwise.
    """
    base = os.path.abspath(root)
    full = os.path.normpath(os.path.join(base, path))
    if full != base and not full.startswith(base.rstrip(os.sep) + os.sep):
        raise BadImage(f"the image path {path!r} leaves the image folder {root}")
    return full
