"""Decodes image files to RGB. Files are untrusted: their size is limited before decoding.

Imports no torch.
"""

import base64
import io
import os
import posixpath
import stat
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from internvl import files
from internvl.config.types import STATISTICS as STATISTICS
from internvl.config.types import Triple as Triple
from internvl.data import jpeg
from internvl.errors import BadImage, ImageTooLarge

HEAD = 1024
"""Bytes read from the start of a file to recognize its format."""

MAX_PIXELS = 178_956_970
"""Largest image that is decoded (Pillow's own error limit): 512 MiB as RGB."""

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
"""Suffixes of image files, in lower case."""

QUALITIES = range(75, 101)
"""JPEG qualities of the training augmentation."""


@dataclass(frozen=True)
class FileSlice:
    """An image inside another file, such as a tar: `size` bytes from `offset` on."""

    path: str
    offset: int
    size: int
    name: str
    """The name that messages show."""

    def __str__(self) -> str:
        return f"{self.name} in {self.path}"

    def read(self) -> bytes:
        """Returns the encoded image."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


ImageRef = str | Path | bytes | FileSlice
"""A path, an fsspec address, encoded bytes, or bytes inside another file."""

Rgb = Image.Image | np.ndarray
"""A decoded image: a Pillow image in mode RGB, or uint8 (H, W, 3)."""

Exif = Literal["ignore", "apply"]
"""Whether the EXIF orientation is applied; the key `data.exif`."""

_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = tuple(_ORIENTATIONS[tag] for tag in (5, 6, 7, 8))
_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
_ORIENTATION_TAG = 0x0112
_JPEG_SIDE = 65_500  # libjpeg's JPEG_MAX_DIMENSION
_LONGEST_NAME, _LONGEST_ADDRESS, _LONGEST_REASON = 300, 40, 200  # characters in a message


def open_rgb(source: ImageRef, exif: Exif = "ignore") -> Image.Image:
    """Decodes an image file (or its bytes) to RGB, size (W, H).

    Like the original, `convert("RGB")` without EXIF orientation: palette and alpha are flattened,
    an animation gives its first frame. Unlike it, a truncated file is an error, and 16-bit gray is
    scaled to 8 bits.

    Args:
        exif: "apply" turns the image upright like `exif_transpose`, if its EXIF can be read.

    Raises:
        BadImage: not a regular file, empty, not an image, damaged, 32 bits per channel, no pixels,
            or more than MAX_PIXELS; the message begins with the file.
    """
    with open_checked(source) as image:
        return _upright(_to_rgb(image, name_of(source)), image, exif)


def open_small(source: ImageRef, side: int, exif: Exif = "ignore") -> Image.Image:
    """Decodes an image to RGB like `open_rgb`, shrunk to at most `side` px a side. For people.

    Raises BadImage for the same files.
    """
    with open_checked(source) as image:
        # JPEG files are decoded at a fraction of their size, several times sooner.
        image.draft("RGB", (2 * side, 2 * side))
        small = _upright(_to_rgb(image, name_of(source)), image, exif)
    small.thumbnail((side, side))
    return small


def read_rgb(source: ImageRef, exif: Exif = "ignore") -> np.ndarray:
    """Decodes like `open_rgb` to uint8 (H, W, 3), in less time if simplejpeg is installed.

    Raises BadImage for the same files.
    """
    with open_checked(source) as image:
        if image.format == "JPEG" and image.fp is not None:
            image.fp.seek(0)  # Pillow has read the header from it
            decoded = jpeg.decode(image.fp.read())
            # Most photographs are upright: no Pillow image is made of the array and back.
            if decoded is not None and (exif == "ignore" or _orientation(image) is None):
                return decoded
            if decoded is not None:
                return np.asarray(_upright(Image.fromarray(decoded), image, exif))
        return np.asarray(_upright(_to_rgb(image, name_of(source)), image, exif))


def stored_size(source: ImageRef, exif: Exif = "ignore") -> tuple[int, int]:
    """Returns (width, height) of an image file in px, as decoded, from its header alone.

    Raises BadImage.
    """
    with open_checked(source) as image:
        width, height = image.size
        method = _orientation(image) if exif == "apply" else None
        return (height, width) if method in _SWAPS_SIDES else (width, height)


def as_rgb(image: Any, exif: Exif = "ignore") -> Rgb:
    """Converts any form of one image to RGB: a Pillow image, or uint8 (H, W, 3).

    Args:
        image: what `read_rgb` takes; a `data:` address; a file object; a Pillow image of any mode;
            an array, uint8 (H, W) or (H, W, C); or a tensor, uint8 (H, W) or, as torchvision's,
            (C, H, W). C is 1 (gray), 3 (RGB) or 4 (RGBA, whose alpha is dropped as in a file).
        exif: see `open_rgb`; also for a Pillow image that still has its EXIF.

    Raises:
        BadImage: see `open_rgb`; another dtype, shape or type.
    """
    if isinstance(image, Image.Image):
        check_size(image.size, "")  # before `load`: it may not be decoded yet
        return _upright(_to_rgb(image, ""), image, exif)
    if isinstance(image, np.ndarray | np.generic):
        return _array_to_rgb(np.asarray(image), "array", "(H, W, C)")
    if is_tensor(image):
        if image.dim() == 3:
            image = image.movedim(0, -1)
        return _array_to_rgb(image.detach().cpu().numpy(), "tensor", "(C, H, W)")
    if isinstance(image, bytearray | memoryview):
        return read_rgb(bytes(image), exif)
    if isinstance(image, str) and image.startswith("data:"):
        return read_rgb(read_data_address(image), exif)
    if isinstance(image, str | bytes | FileSlice | os.PathLike):
        return read_rgb(image, exif)  # type: ignore[arg-type]  # Path is one PathLike
    if is_file_object(image):
        return read_rgb(read_file_object(image), exif)
    raise BadImage(
        f"an image is a path, bytes, a file object, a Pillow image, a uint8 array or a uint8 "
        f"tensor, not {type(image).__name__}"
    )


def rgb_at(label: str, image: Any, exif: Exif = "ignore") -> Rgb:
    """Decodes an image as `as_rgb`. Raises BadImage that begins with `label`, such as "image 3"."""
    try:
        return as_rgb(image, exif)
    except BadImage as error:
        raise BadImage(f"{label}: {error}") from None


def is_tensor(value: Any) -> bool:
    """Returns whether a value is a torch tensor."""
    # Without importing torch: an image file is checked, and refused, before that takes seconds.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_file_object(value: Any) -> bool:
    """True for a file object: of `open`, BytesIO, a urllib response."""
    return not isinstance(value, FileSlice) and callable(getattr(value, "read", None))


def read_file_object(file: Any) -> bytes:
    """Reads the bytes of a file object, from its start if it can seek, as Pillow does.

    Raises:
        BadImage: it is closed, in text mode, write-only, or cannot be read.
    """
    name = getattr(file, "name", "")
    name = name if isinstance(name, str) else ""
    if isinstance(file, io.TextIOBase):  # reading could fail at the first byte that is no text
        raise _bad(name, 'the file object gives text, not bytes; open it with mode "rb"')
    try:
        if getattr(file, "seekable", bool)():
            file.seek(0)
        data = file.read()
    # A file object may be of any library, such as a client of some storage.
    except Exception as error:
        raise _bad(name, f"the file object cannot be read ({error}); open it again") from error
    if not isinstance(data, bytes | bytearray | memoryview):
        type_name = type(data).__name__
        raise _bad(name, f'the file object gives {type_name}, not bytes; open it with mode "rb"')
    return bytes(data)


def read_data_address(address: str) -> bytes:
    """Decodes the bytes of a `data:` address. Raises BadImage if they are not base64."""
    try:
        return base64.b64decode(address.partition(",")[2], validate=True)
    except ValueError as error:
        raise BadImage(f"an image is not base64 ({error})") from None


def _array_to_rgb(pixels: np.ndarray, noun: str, axes: str) -> np.ndarray:
    """Returns uint8 (H, W, 3) of a channels-last array; `noun` and `axes` are for messages."""
    if pixels.dtype != np.uint8:
        raise BadImage(
            f"an image as {noun} holds uint8 from 0 to 255, not {pixels.dtype}; scale and round it"
        )
    shape = pixels.shape
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in _CHANNELS):
        if noun == "tensor" and len(shape) == 3:
            shape = (shape[2], *shape[:2])  # the message shows the shape that the caller has
        raise BadImage(
            f"an image as {noun} has the shape (H, W) or {axes} with C of 1, 3 or 4, not "
            f"{tuple(shape)}"
        )
    check_size((shape[1], shape[0]), "")
    if len(shape) == 2 or shape[2] == 1:
        return np.repeat(pixels.reshape(shape[0], shape[1], 1), 3, axis=2)
    return np.ascontiguousarray(pixels[:, :, :3])


def name_of(source: ImageRef) -> str:
    """Returns the path or address of an image for messages, "" for bytes."""
    if isinstance(source, bytes):
        return ""
    # From untrusted annotation files: lone surrogates are escaped, endless names are cut.
    name = str(source).encode("utf-8", "backslashreplace").decode()
    longest = _LONGEST_NAME if not name.startswith("data:") else _LONGEST_ADDRESS
    return name if len(name) <= longest else f"{name[:longest]}…"


def _bad(name: str, reason: str) -> BadImage:
    return BadImage(f"{name}: {reason}" if name else reason)


@contextmanager
def open_checked(source: ImageRef, noun: str = "image") -> Iterator[ImageFile.ImageFile]:
    """Opens an image file without decoding it and checks its size; `noun` is for messages.

    Raises BadImage.
    """
    name, file = name_of(source), _file(source, noun)
    with decoder_errors(name, noun):
        try:
            image = Image.open(file)
        except UnidentifiedImageError:
            raise _bad(name, _unknown(source, file, noun)) from None
    with image:
        check_size(image.size, name)
        if image.format == "EPS":
            # Pillow would run an untrusted program in Ghostscript, which may never end.
            raise _bad(name, "EPS is not read; save the image as PNG")
        yield image


@contextmanager
def decoder_errors(name: str, noun: str = "image") -> Iterator[None]:
    """Turns any exception of a single decoder call on untrusted bytes into BadImage.

    Wrap no code of this package: its mistakes must stay visible.
    """
    try:
        with warnings.catch_warnings():
            # About size (checked by `check_size`) and metadata; none is a reason to stop.
            warnings.filterwarnings("ignore", module=r"PIL\b")
            yield
    except BadImage:
        raise
    # Pillow's plugins and PyAV let pass whatever happens to them on damaged files: OSError,
    # SyntaxError, ValueError, KeyError, RuntimeError, AttributeError, struct.error, MemoryError …
    except Exception as error:
        raise undecodable(name, noun, error) from error


def undecodable(name: str, noun: str, error: Exception) -> BadImage:
    """Returns the BadImage for an exception of a decoder; `noun` is "image" or "video"."""
    if isinstance(error, Image.DecompressionBombError):
        return _too_large(name, None)
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if type(error) in (KeyError, IndexError, AssertionError):  # a bare key says nothing
        reason = f"{type(error).__name__} {error}"
    if isinstance(error, AttributeError):  # PyAV's, of a stream without a decoder
        reason = "its header does not say how to decode it: it is cut off or of an unknown codec"
    elif isinstance(error, TypeError):  # a reader that stumbles over a header
        reason = "its reader fails on it"
    reason = " ".join(reason.split())[:_LONGEST_REASON]
    return _bad(name, f"the {noun} cannot be decoded ({reason}); {_remedy(name)}")


def _file(source: ImageRef, noun: str) -> str | Path | io.BytesIO:
    """Returns what Pillow opens. Raises BadImage if the file is missing or not a regular one."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, FileSlice):
        check_file(source.path, name_of(source), noun)
        data = source.read()
        if len(data) < source.size:
            raise BadImage(f"{name_of(source)}: the file ends within this {noun}; it is truncated")
        return io.BytesIO(data)
    if is_address(source):
        return io.BytesIO(read_address(str(source), noun))
    check_file(source, name_of(source), noun)
    return source


def check_file(path: str | Path, name: str, noun: str = "image") -> None:
    """Raises BadImage unless `path` is a regular file; messages call it the `noun` `name`."""
    if not str(path).strip():
        raise BadImage(f"the path of the {noun} is empty; write the file's name")
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise BadImage(f"there is no {noun} {name}{remedy_for_missing(path)}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL, or half a surrogate pair
        reason = error.strerror if isinstance(error, OSError) else "no possible file name"
        raise BadImage(f"{name}: the {noun} cannot be read ({reason})") from None
    if stat.S_ISDIR(mode):
        raise BadImage(f"the {noun} {name} is a folder")
    if not stat.S_ISREG(mode):  # to open a pipe may block for ever
        raise BadImage(f"the {noun} {name} is a pipe or a device, not a file")


def remedy_for_missing(path: str | Path) -> str:
    """Returns what to do about a missing file: another spelling that is there, or a lost folder."""
    if "\\" in str(path) and os.sep == "/":
        slashes = name_of(str(path).replace("\\", "/"))
        return f"; its name has backslashes, as Windows has; write {slashes}"
    folder, name = os.path.split(path)
    try:
        names = _names_in(folder or ".", os.stat(folder or ".").st_mtime_ns)
    except (OSError, ValueError):
        return f"; there is no folder {name_of(folder)} either, correct the path"
    other = names.get(_normalized(name))
    if other is None:
        return "; correct the name, or put the file there"
    return f"; there is {name_of(other)} in the folder, write it so"


@lru_cache(maxsize=8)
def _names_in(folder: str, changed_ns: int) -> dict[str, str]:
    """Returns the names in a folder by their normalized spelling."""
    # Cached: listing a large folder for each of thousands of missing files would take minutes.
    return {_normalized(name): name for name in os.listdir(folder)}


def _normalized(name: str) -> str:
    # macOS stores accents as combining marks (NFD), others as composed letters.
    return unicodedata.normalize("NFC", name).casefold()


def is_address(path: str | Path) -> bool:
    """True for an fsspec address such as s3://bucket/key."""
    return "://" in str(path)


def read_address(address: str, noun: str = "image") -> bytes:
    """Reads the bytes at an fsspec address.

    Raises:
        BadImage: they cannot be read, or the package of this storage is missing.
    """
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    name = name_of(address)
    try:
        system, path = fsspec.url_to_fs(address)
    except Exception as error:  # see below
        raise BadImage(f"{name} cannot be read ({error})") from error
    if isinstance(system, LocalFileSystem):
        check_file(path, name, noun)
    try:
        return system.cat_file(path)
    except FileNotFoundError:
        raise BadImage(f"there is nothing at {name}") from None
    # Each storage has its own client library with its own exceptions.
    except Exception as error:
        raise BadImage(f"{name} cannot be read ({error})") from error


def _unknown(source: ImageRef, file: str | Path | io.BytesIO, noun: str) -> str:
    """Returns the real format of a file that is not an image, and the remedy."""
    if isinstance(file, io.BytesIO):
        head = file.getvalue()[:HEAD]
    else:
        head = read_head(file)
    if not head:
        return f"the {noun} file is empty; {_remedy(name_of(source))}"
    actual_format = files.describe_media(head, noun)
    if actual_format is None:
        return f"not an image Pillow knows; {_remedy(name_of(source))}"
    if isinstance(source, FileSlice):
        return f"{actual_format}, then write the tar again"
    return actual_format


def read_head(path: str | Path) -> bytes:
    """Reads the first HEAD bytes of a file, enough to recognize its format."""
    with open(path, "rb") as file:
        return file.read(HEAD)


def _remedy(name: str) -> str:
    """Returns the remedy for a damaged image; one without a name is not in a file."""
    return "replace the file" if name else "replace it"


def check_size(size: tuple[int, int], name: str) -> None:
    """Raises BadImage for more than MAX_PIXELS or none; `size` is (width, height) in pixels."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise _too_large(name, width * height)
    if width < 1 or height < 1:
        raise _bad(name, f"the image of {width} x {height} pixels is empty; {_remedy(name)}")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Decodes a Pillow image of any mode to RGB. Raises BadImage."""
    with decoder_errors(name):
        image.load()
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        # Pillow's `convert` clips 16 bits to 8, which makes nearly every image white.
        gray = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((gray + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise _bad(name, "the image has 32 bits a channel; save it with 8")
    with decoder_errors(name):
        return image.convert("RGB")


def _upright(rgb: Image.Image, image: Image.Image, exif: Exif) -> Image.Image:
    """Returns `rgb`, decoded from `image`, turned by the EXIF orientation of `image`."""
    method = _orientation(image) if exif == "apply" else None
    return rgb if method is None else rgb.transpose(method)


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """Returns what turns a loaded (JPEG: opened) Pillow image upright, None if nothing."""
    try:
        with decoder_errors(""):
            orientation = image.getexif().get(_ORIENTATION_TAG)
    except BadImage:
        # Like viewers, which show an image with damaged EXIF as it is stored.
        return None
    return _ORIENTATIONS.get(orientation) if isinstance(orientation, int) else None


def size_of(image: np.ndarray) -> tuple[int, int]:
    """Returns (width, height) in pixels of uint8 (H, W, 3), as Pillow's `size`."""
    height, width, _ = image.shape
    return width, height


def _too_large(name: str, pixels: int | None) -> ImageTooLarge:
    subject = "the image" if pixels is None else f"the image has {pixels:,} pixels and"
    reason = f"{subject} exceeds the limit of {MAX_PIXELS:,} pixels; shrink the file"
    return ImageTooLarge(f"{name}: {reason}" if name else reason)


def join_inside(root: str | Path, path: str) -> str:
    """Joins `root / path`, which must stay inside `root`: annotation files are untrusted.

    With an empty `root`, absolute paths and addresses are returned unchanged, relative ones must
    stay inside the working directory.

    Raises:
        BadImage: the path leaves `root`, or is an address of another storage.
    """
    if not str(root):
        if is_address(path):
            return path
        root = "/" if os.path.isabs(path) else "."
    if is_address(path) and path.partition("://")[0] != str(root).partition("://")[0]:
        remedy = "download it there and write its path"
        if path.startswith("file://"):
            remedy = "write its path without `file://`"
        raise BadImage(
            f"{name_of(path)} is an address, and files are named from the image folder "
            f"{str(root)!r} on; {remedy}"
        )
    if is_address(root):
        protocol, _, base = str(root).partition("://")
        base = base.rstrip("/")
        inner = path.removeprefix(f"{protocol}://")
        # Normalized before the check below: `..` could leave the root.
        full = posixpath.normpath(inner if inner != path else posixpath.join(base, path))
        result = f"{protocol}://{full}"
    else:
        base = os.path.abspath(root)
        full = result = os.path.normpath(os.path.join(base, path))
        base = base.rstrip(os.sep)  # "/" becomes "": every path is inside
        # `normpath` drops the final slash, by which a folder of frames is recognized.
        result += os.sep if path.endswith("/") else ""
    if full != base and not full.startswith(base + "/"):
        raise BadImage(
            f"the image path {path!r} leaves the image folder {str(root)!r}; name a folder above "
            "it (`images` of a source, `root` in a meta file), or an empty one for absolute paths"
        )
    return result


def pad_square(image: Image.Image, mean: Triple) -> Image.Image:
    """Centres the RGB image on a square of the mean colour (original: `expand2square`)."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    # Truncated, not rounded, as in the original.
    color = tuple(int(255 * channel) for channel in mean)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def degrade(image: Image.Image, quality: int) -> Image.Image:
    """Encodes the RGB image as JPEG and decodes it (original: `simulate_jpeg_degradation`).

    Raises BadImage for a side longer than JPEG's limit.
    """
    if max(image.size) > _JPEG_SIDE:
        raise BadImage(
            f"an image of {image.width} x {image.height} pixels cannot be degraded, for JPEG ends "
            f"at {_JPEG_SIDE:,}; shrink it, or set `augment: false` for its source"
        )
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    with Image.open(buffer) as degraded:
        return degraded.convert("RGB")
