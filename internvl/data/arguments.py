"""Checks arguments of public calls; a single text, path or image becomes a list of one."""

import difflib
import math
import os
from collections.abc import Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
from PIL import Image

from internvl.data.images import FileSlice, is_file_object, is_tensor, read_file_object
from internvl.errors import UserError

_ONE_IMAGE = (str, bytes, bytearray, memoryview, os.PathLike, FileSlice, Image.Image)


def list_texts(texts: Any, noun: str = "text") -> list[str]:
    """Lists texts, or names; a single one becomes a list of one.

    Args:
        texts: a string, or any ordered collection of strings (arrays and series included).
        noun: what messages call one of them.

    Raises:
        UserError: an unordered collection, or an item that is not text.
    """
    values = [texts] if isinstance(texts, str) else listed(texts, f"{noun}s")
    for index, value in enumerate(values):
        reason = not_a_text(value)
        if reason is not None:
            raise UserError(f"{noun} {index} {reason}")
    return values


def not_a_text(value: Any) -> str | None:
    """Returns why a value is not encodable text, None if it is.

    >>> not_a_text(3.5)
    'is a float (3.5), not a text'
    """
    if not isinstance(value, str):
        noun = type(value).__name__
        article = "an" if noun[0] in "aeiou" else "a"
        return f"is {article} {noun} ({str(value)[:40]}), not a text"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # A lone surrogate, as JSON escapes can make: no tokenizer takes it.
        half = ascii(value[error.start])[1:-1]
        return f"has half of a character ({half}) at place {error.start}; replace it"
    return None


def list_images(images: Any) -> list[Any]:
    """Lists images; a single one of any form becomes a list of one.

    Args:
        images: one path, encoded file, file object, Pillow image, tensor or array (H, W) or
            (H, W, C); or several of them: a collection, or an array (B, H, W, C).

    Raises:
        UserError: an unordered collection, or not images.
        BadImage: a file object that is closed or in text mode.
    """
    if isinstance(images, _ONE_IMAGE) or is_tensor(images) or is_file_object(images):
        images = [images]
    elif isinstance(images, np.ndarray) and images.dtype.kind not in "OUS":
        # Numbers are an image or a batch; an array of paths is a collection like a list.
        images = list(images) if images.ndim > 3 else [images]
    return [_rereadable(image) for image in listed(images, "images")]


def _rereadable(image: Any) -> Any:
    """Returns the image in a form that any thread can read repeatedly: file objects as bytes."""
    if isinstance(image, str):
        return str(image)  # NumPy's strings are np.generic too, which `as_rgb` takes for pixels
    return read_file_object(image) if is_file_object(image) else image


def listed(values: Any, nouns: str) -> list[Any]:
    """Lists an ordered collection. Raises UserError if `values` is none."""
    if isinstance(values, np.ndarray):
        return np.atleast_1d(values).ravel().tolist()
    # The results come in the order of the arguments, so there must be one.
    if isinstance(values, Mapping | set | frozenset):
        raise UserError(f"{nouns}: a {type(values).__name__} has no places; give a list")
    if isinstance(values, bytes) or not isinstance(values, Iterable):
        raise UserError(f"{nouns} must be a list, not {type(values).__name__}")
    return list(values)


def check_whole(name: str, value: Any, least: int) -> None:
    """Raises UserError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise UserError(f"{name} must be a whole number of at least {least}, not {value!r}")


def check_number(
    name: str, value: Any, *, above: float | None = None, most: float = math.inf
) -> None:
    """Raises UserError unless `value` is a finite number above `above` and at most `most`."""
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and (above is None or value > above) and value <= most:
        return
    bounds = [] if above is None else [f"above {above:g}"]
    bounds += [] if math.isinf(most) else [f"at most {most:g}"]
    span = f" {' and '.join(bounds)}" if bounds else ""
    raise UserError(f"{name} must be a number{span}, not {value!r}")


def nearest(name: str, valid_names: Collection[str]) -> str:
    """Suggests the valid name closest to a mistyped one, or lists all."""
    close = difflib.get_close_matches(name, valid_names, n=1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(valid_names)}"
