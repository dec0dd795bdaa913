"""Image files to RGB pictures. Images are untrusted: their size is limited before decoding."""

import io
import os
import posixpath
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from internvl.data import jpeg
from internvl.errors import UserError

MAX_PIXELS = 178_956_970
"""Largest picture that is decoded (Pillow's own error limit): 512 MiB as RGB."""

Triple = tuple[float, float, float]
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
"""Of picture files, in lower case."""

STATISTICS: dict[str, tuple[Triple, Triple]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.4814546, 0.4578275, 0.40821073), (0.2686295, 0.2613025, 0.2757711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and deviation per channel, of pixels from 0 to 1. Original: `train/constants.py`."""

QUALITIES = range(75, 101)
"""JPEG qualities of the training augmentation."""


class BadImage(UserError):
    """A picture or video that cannot be read: the reason, in words a user can act on."""


@dataclass(frozen=True)
class FileSlice:
    """A picture inside another file, such as a tar: `size` bytes from `offset` on."""

    path: str
    offset: int
    size: int
    name: str
    """What messages call it."""

    def __str__(self) -> str:
        return f"{self.name} in {self.path}"

    def read(self) -> bytes:
        """The encoded picture."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


Picture = str | Path | bytes | FileSlice
"""A path, an fsspec address, the encoded bytes, or bytes inside a file."""

Rgb = Image.Image | np.ndarray
"""A decoded picture: Pillow's in mode RGB, or uint8 (H, W, 3)."""


def open_rgb(source: Picture) -> Image.Image:
    """The picture in a file (or its bytes) as RGB, size (W, H).

    As the original: `convert("RGB")` (palette and alpha flattened, first frame of an animation),
    EXIF orientation not applied. Unlike it, a truncated file is an error, and 16-bit gray is
    scaled to 8 bits where Pillow's conversion would make it white.

    Raises:
        BadImage: missing, empty, no picture, truncated, of 32 bits a channel, or more than
            MAX_PIXELS pixels.
    """
    with _opened(source) as image:
        return _to_rgb(image)


def read_rgb(source: Picture) -> np.ndarray:
    """The same pixels, uint8 (H, W, 3), in less time where simplejpeg is installed.

    Raises BadImage for the same files.
    """
    with _opened(source) as image:
        if image.format == "JPEG" and image.fp is not None:
            image.fp.seek(0)
            decoded = jpeg.decode(image.fp.read())
            if decoded is not None:
                return decoded
        return np.asarray(_to_rgb(image))


@contextmanager
def _opened(source: Picture) -> Iterator[ImageFile.ImageFile]:
    """The picture before it is decoded. Raises BadImage for everything that happens within, too."""
    try:
        with warnings.catch_warnings():
            # Pillow warns from half the limit on; the limit itself is checked below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(_file(source)) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise BadImage(_too_large(width * height))
                yield image
    except FileNotFoundError:
        raise BadImage(f"there is no image {source!s}") from None
    except IsADirectoryError:
        raise BadImage(f"the image {source!s} is a folder") from None
    except Image.DecompressionBombError:
        raise BadImage(_too_large(None)) from None
    except UnidentifiedImageError:
        what = "the image file is empty" if _is_empty(source) else "not an image Pillow knows"
        raise BadImage(f"{what}; replace the file") from None
    except (OSError, SyntaxError, ValueError, MemoryError) as error:
        if isinstance(error, BadImage):
            raise
        raise BadImage(f"the image cannot be decoded ({error}); replace the file") from None


def _file(source: Picture) -> str | Path | io.BytesIO:
    """What Pillow opens."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, FileSlice):
        return io.BytesIO(source.read())
    if is_address(source):
        return io.BytesIO(read_address(str(source)))
    return source


def is_address(path: str | Path) -> bool:
    """Whether fsspec opens this, such as s3://bucket/key, rather than the file system."""
    return "://" in str(path)


def read_address(address: str) -> bytes:
    """The bytes at an fsspec address.

    Raises:
        BadImage: they cannot be read, or a package for this kind of storage is missing.
    """
    import fsspec

    try:
        with fsspec.open(address, "rb") as file:
            return file.read()
    except ImportError as error:
        raise BadImage(f"{address}: {error}") from None
    except FileNotFoundError:
        raise BadImage(f"there is nothing at {address}") from None
    except (OSError, ValueError) as error:
        raise BadImage(f"{address} cannot be read ({error})") from None


def _is_empty(source: Picture) -> bool:
    if isinstance(source, bytes):
        return not source
    if isinstance(source, FileSlice):
        return source.size == 0
    return not is_address(source) and os.path.getsize(source) == 0


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I;16"):
        gray = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((gray + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImage("the image has 32 bits a channel; save it with 8")
    return image.convert("RGB")


def size_of(picture: np.ndarray) -> tuple[int, int]:
    """(width, height) in pixels of uint8 (H, W, 3), as Pillow's `size`."""
    height, width, _ = picture.shape
    return width, height


def _too_large(pixels: int | None) -> str:
    found = "the image" if pixels is None else f"the image has {pixels:,} pixels and"
    return f"{found} exceeds the limit of {MAX_PIXELS:,} pixels; shrink the file"


def join_inside(root: str | Path, path: str) -> str:
    """`root / path`, which must stay inside `root` (annotation files are untrusted too).

    Raises BadImage otherwise.
    """
    if is_address(root):
        protocol, _, base = str(root).partition("://")
        base = base.rstrip("/")
        inner = path.removeprefix(f"{protocol}://")
        full = posixpath.normpath(inner if inner != path else posixpath.join(base, path))
        result = f"{protocol}://{full}"
    else:
        base = os.path.abspath(root).rstrip(os.sep)
        full = result = os.path.normpath(os.path.join(base, path))
        # A folder of frames is named with a slash at its end.
        result += os.sep if path.endswith("/") else ""
    if full != base and not full.startswith(base + "/"):
        raise BadImage(f"the image path {path!r} leaves the image folder {root}")
    return result


def pad_square(image: Image.Image, mean: Triple) -> Image.Image:
    """The RGB image in the middle of a square of the mean colour (original: `expand2square`)."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    color = tuple(int(255 * channel) for channel in mean)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def degrade(image: Image.Image, quality: int) -> Image.Image:
    """The RGB image after JPEG at this quality (original: `simulate_jpeg_degradation`)."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    with Image.open(buffer) as degraded:
        return degraded.convert("RGB")


def degrade_tiles(tiles: Tensor, qualities: Sequence[int]) -> Tensor:
    """uint8 (N, 3, S, S), every tile after JPEG at its quality."""
    each = [
        np.asarray(degrade(Image.fromarray(tile.permute(1, 2, 0).numpy()), quality))
        for tile, quality in zip(tiles, qualities, strict=True)
    ]
    return torch.from_numpy(np.stack(each)).permute(0, 3, 1, 2).contiguous()
