"""Pillow's bicubic resize of RGB, bit for bit, compiled with numba where that is installed.

Pillow rounds to a byte between its two passes and keeps 22 bits of each weight, so a resize is a
few integer sums; here they run over 64 rows at once, and the result is written straight into its
tiles. Original: Pillow's `src/libImaging/Resample.c`.
"""

import importlib
import itertools
import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np
from PIL import Image

_BITS = 22  # of a weight, behind the point
_LANES = 64  # rows of the picture that are summed side by side
_LEAST_PIXELS = 1 << 16  # smaller pictures take Pillow no time worth saving
_PATIENCE = 100  # resizes by Pillow before this process compiles, which takes about two seconds

Weights = tuple[np.ndarray, np.ndarray, np.ndarray]
Resize = Callable[[np.ndarray, np.ndarray], None]


def find(width: int, height: int) -> Resize | None:
    """What resizes to `width` x `height` pixels faster than Pillow and equally, or None.

    It takes an RGB picture, uint8 (H, W, 3), and fills tiles, uint8 (rows, columns, 3, S, S). A
    process that resizes a few pictures only never compiles it.
    """
    if width * height < _LEAST_PIXELS or next(_asked) < _PATIENCE:
        return None
    return _checked()


_asked = itertools.count()


@cache
def _checked() -> Resize | None:
    """The compiled resize, if numba is there and this Pillow gives the same pixels."""
    try:
        numba = importlib.import_module("numba")
    except ImportError:
        return None
    compiled = numba.njit(nogil=True)
    resize = _Resize(compiled(_across), compiled(_down))
    draw = np.random.default_rng(0)
    # One picture that Pillow shrinks in height first, and two that it does not.
    for height, width in ((120, 70), (70, 120), (30, 20)):
        picture = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        tiles = np.empty((2, 1, 3, 48, 48), dtype=np.uint8)
        resize(picture, tiles)
        wanted = np.asarray(Image.fromarray(picture).resize((48, 96)))
        if not np.array_equal(tiles.transpose(0, 3, 1, 4, 2).reshape(96, 48, 3), wanted):
            return None
    return resize


class _Resize:
    """Two passes, in the order that Pillow would take them."""

    def __init__(self, across: Any, down: Any) -> None:
        self.across = across
        self.down = down

    def __call__(self, picture: np.ndarray, tiles: np.ndarray) -> None:
        rows, columns, _, size, _ = tiles.shape
        height, width, _ = picture.shape
        to_width, to_height = columns * size, rows * size
        if height - to_height > max(0, 2 * (width - to_width)):
            picture = self._height_only(picture, to_height)
            height = to_height
        middle = np.empty((3, height, to_width), dtype=np.uint8)
        self.across(picture, *_weights(width, to_width), middle)
        self.down(middle, *_weights(height, to_height), tiles)

    def _height_only(self, picture: np.ndarray, to_height: int) -> np.ndarray:
        """uint8 (to_height, W, 3): the pass down alone, as across the turned picture."""
        height, width, _ = picture.shape
        turned = np.ascontiguousarray(picture.transpose(1, 0, 2))
        planes = np.empty((3, width, to_height), dtype=np.uint8)
        self.across(turned, *_weights(height, to_height), planes)
        return np.ascontiguousarray(planes.transpose(2, 1, 0))


@lru_cache(maxsize=4096)
def _weights(size: int, to_size: int) -> Weights:
    """First source pixel, number of pixels, and int32 weights (to_size, taps) of every target."""
    scale = size / to_size
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    center = (np.arange(to_size) + 0.5) * scale
    # Pillow truncates towards zero, then clips.
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    count = np.minimum((center + support + 0.5).astype(np.int64), size) - first
    tap = np.arange(math.ceil(support) * 2 + 1)
    distance = (tap + first[:, None] - center[:, None] + 0.5) * (1.0 / stretch)
    weight = np.where(tap < count[:, None], _bicubic(np.abs(distance)), 0.0)
    total = np.zeros(to_size)
    for column in weight.T:  # one after the other: the order of a float sum shows
        total = total + column
    weight = weight / total[:, None]
    half = np.where(weight < 0, -0.5, 0.5)
    fixed = np.trunc(half + weight * (1 << _BITS)).astype(np.int32)
    return first.astype(np.int32), count.astype(np.int32), fixed


def _bicubic(x: np.ndarray) -> np.ndarray:
    a = -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _across(
    picture: np.ndarray, first: np.ndarray, count: np.ndarray, weight: np.ndarray, out: np.ndarray
) -> None:
    """uint8 (H, W, 3) -> (3, H, to_width). Compiled; 64 rows are turned so that sums vectorize."""
    height, width, _ = picture.shape
    to_width = out.shape[2]
    turned = np.empty((width * 3, _LANES), np.int32)
    sums = np.empty(_LANES, np.int32)
    done = np.empty((to_width, _LANES), np.uint8)
    for top in range(0, height, _LANES):
        lanes = min(_LANES, height - top)
        for lane in range(lanes):
            row = picture[top + lane].reshape(-1)
            for x in range(width * 3):
                turned[x, lane] = row[x]
        for channel in range(3):
            for x in range(to_width):
                for lane in range(_LANES):
                    sums[lane] = np.int32(1 << (_BITS - 1))
                for tap in range(count[x]):
                    w = weight[x, tap]
                    source = (first[x] + tap) * 3 + channel
                    for lane in range(_LANES):
                        sums[lane] += turned[source, lane] * w
                for lane in range(_LANES):
                    done[x, lane] = min(max(sums[lane] >> _BITS, 0), 255)
            for lane in range(lanes):
                target = out[channel, top + lane]
                for x in range(to_width):
                    target[x] = done[x, lane]


def _down(
    planes: np.ndarray, first: np.ndarray, count: np.ndarray, weight: np.ndarray, tiles: np.ndarray
) -> None:
    """uint8 (3, H, columns S) -> (rows, columns, 3, S, S). Compiled."""
    width = planes.shape[2]
    columns, size = tiles.shape[1], tiles.shape[3]
    sums = np.empty(width, np.int32)
    for channel in range(3):
        for y in range(weight.shape[0]):
            for x in range(width):
                sums[x] = np.int32(1 << (_BITS - 1))
            for tap in range(count[y]):
                w = weight[y, tap]
                row = planes[channel, first[y] + tap]
                for x in range(width):
                    sums[x] += np.int32(row[x]) * w
            for column in range(columns):
                target = tiles[y // size, column, channel, y % size]
                for x in range(size):
                    target[x] = min(max(sums[column * size + x] >> _BITS, 0), 255)
