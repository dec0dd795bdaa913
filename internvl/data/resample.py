"""Bicubic resizes of RGB, Pillow's and torch's, bit for bit, compiled where numba is installed.

Both round to a byte between their two passes and to a whole number each weight, Pillow's of 22
bits behind the point, torch's of 16 bits in all. So a resize is a few integer sums; here they run
over a whole row at once, and the result is written straight into its tiles. Originals: Pillow's
`src/libImaging/Resample.c`, torch's `UpSampleKernelAVXAntialias.h`.
"""

import importlib
import itertools
import logging
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)

_LEAST_PIXELS = 1 << 16  # smaller images take Pillow no time worth saving
_PATIENCE = 100  # resizes by Pillow before this process compiles, which takes about two seconds

Weights = tuple[np.ndarray, np.ndarray, int]
Resize = Callable[[np.ndarray, np.ndarray], None]


def find(width: int, height: int, how: str) -> Resize | None:
    """What resizes to `width` x `height` pixels faster than `how` ("pillow", "torch") and equally.

    It takes an RGB image, uint8 (H, W, 3), and fills tiles, uint8 (rows, columns, 3, S, S). None
    without numba, and for a process that resizes a few images only: it never compiles it.
    """
    if width * height < _LEAST_PIXELS or next(_asked) < _PATIENCE:
        return None
    return _checked(how)


def by_torch(image: np.ndarray, width: int, height: int) -> Tensor:
    """uint8 (H, W, 3) -> (3, height, width): antialiased, in Pillow's order of passes."""
    # Channels last in memory: the layout of torch's vectorized kernel.
    pixels = torch.from_numpy(np.require(image, requirements="W")).permute(2, 0, 1)[None]
    tall, wide, _ = image.shape
    if height_first((wide, tall), (width, height)):
        pixels = F.interpolate(pixels, (height, wide), mode="bicubic", antialias=True)
    return F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)[0]


_asked = itertools.count()


def height_first(size: tuple[int, int], to_size: tuple[int, int]) -> bool:
    """Whether Pillow resizes `size` to `to_size`, both (W, H), with its pass down first.

    Rounding to bytes between the passes makes their order show. Pillow 13 shrinks the height first
    where that saves most; before, the width always came first.
    """
    (width, height), (to_width, to_height) = size, to_size
    return height - to_height > max(0, 2 * (width - to_width)) and _may_begin_with_height()


@cache
def _may_begin_with_height() -> bool:
    """Whether the Pillow that is installed ever does, by a tall image in one call and in two."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 40, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    in_two = image.resize((40, 30)).resize((20, 30))
    return image.resize((20, 30)).tobytes() == in_two.tobytes()


@cache
def _checked(how: str) -> Resize | None:
    """The compiled resize, if numba is there and this Pillow, or torch, gives the same pixels."""
    try:
        numba = importlib.import_module("numba")
    except ImportError:
        return None
    compiled = numba.njit(nogil=True)
    resize = _Resize(compiled(_across), compiled(_down), how)
    draw = np.random.default_rng(0)
    # To 96 x 48: both shrunk (by Pillow 13 the height first, then the width), both grown, one each.
    for height, width in ((220, 70), (120, 200), (30, 20), (200, 30), (40, 120)):
        image = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        tiles = np.empty((2, 1, 3, 48, 48), dtype=np.uint8)
        resize(image, tiles)
        if how == "pillow":
            wanted = np.asarray(Image.fromarray(image).resize((48, 96)))
        else:
            wanted = by_torch(image, 48, 96).permute(1, 2, 0).numpy()
        if not np.array_equal(tiles.transpose(0, 3, 1, 4, 2).reshape(96, 48, 3), wanted):
            logger.debug("%s resizes in another way than the compiled resize", how)
            return None
    return resize


class _Resize:
    """Two passes, in the order that Pillow would take them."""

    def __init__(self, across: Any, down: Any, how: str) -> None:
        self.across = across
        self.down = down
        self.how = how

    def __call__(self, image: np.ndarray, tiles: np.ndarray) -> None:
        rows, columns, _, size, _ = tiles.shape
        height, width, _ = image.shape
        to_width, to_height = columns * size, rows * size
        if height_first((width, height), (to_width, to_height)):
            image = self._height_only(image, to_height)
            height = to_height
        middle = np.empty((3, height, to_width), dtype=np.uint8)
        self.across(_frozen(image), *_weights(width, to_width, self.how), middle)
        self.down(_frozen(middle), *_weights(height, to_height, self.how), tiles)

    def _height_only(self, image: np.ndarray, to_height: int) -> np.ndarray:
        """uint8 (to_height, W, 3): the pass down alone, of rows as they lie."""
        height, width, _ = image.shape
        done = np.empty((to_height, width, 3), dtype=np.uint8)
        tile = done.reshape(1, 1, 1, to_height, width * 3)
        row = _frozen(image.reshape(1, height, width * 3))
        self.down(row, *_weights(height, to_height, self.how), tile)
        return done


def _frozen(array: np.ndarray) -> np.ndarray:
    """Read-only, as arrays of Pillow's images are: what may be written is compiled once more."""
    view = array.view()
    view.flags.writeable = False
    return view


@lru_cache(maxsize=4096)
def _weights(size: int, to_size: int, how: str) -> Weights:
    """Of every target the first source pixel, uint64, and weights (taps, to_size), with their bits.

    So many bits stand behind the point: 22 of int32 for Pillow, for torch as many as the largest
    weight leaves of int16. Taps are a multiple of four; those that a target does not need weigh
    nothing.
    """
    scale = size / to_size
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    center = (np.arange(to_size) + 0.5) * scale
    # Pillow truncates towards zero, then clips.
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    count = np.minimum((center + support + 0.5).astype(np.int64), size) - first
    tap = np.arange(-(-count.max() // 4) * 4)
    distance = (tap + first[:, None] - center[:, None] + 0.5) * (1.0 / stretch)
    weight = np.where(tap < count[:, None], _bicubic(np.abs(distance)), 0.0)
    total = np.zeros(to_size)
    for column in weight.T:  # one after the other: the order of a float sum shows
        total = total + column
    weight = weight / total[:, None]
    bits = 22
    if how == "torch":
        bits = 14
        while int(0.5 + weight.max() * (1 << (bits + 1))) < 1 << 15:
            bits += 1
    half = np.where(weight < 0, -0.5, 0.5)
    fixed = np.trunc(half + weight * (1 << bits)).astype(np.int16 if how == "torch" else np.int32)
    return first.astype(np.uint64), np.ascontiguousarray(fixed.T), bits


def _bicubic(x: np.ndarray) -> np.ndarray:
    a = -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _across(
    image: np.ndarray, first: np.ndarray, weight: np.ndarray, bits: int, out: np.ndarray
) -> None:
    """uint8 (H, W, 3) -> (3, H, to_width). Compiled.

    Each pixel is packed with the three to its right, so a target reads four of them at once.
    """
    height, width, _ = image.shape
    taps, to_width = weight.shape
    lines = image.reshape(height, width * 3)
    row = np.zeros((width + taps) * 3, np.uint8)  # black to the right: weighted with zero
    packed = np.empty((width + taps) * 3 - 9, np.uint32)
    start = first * np.uint64(3)
    read = np.empty((3, to_width), np.uint32)
    sums = np.empty((3, to_width), np.int32)
    for y in range(height):
        line = lines[y]
        for i in range(width * 3):  # a loop is five times as fast as a slice here
            row[i] = line[i]
        for i in range(len(packed)):
            low = np.uint32(row[i]) | (np.uint32(row[i + 3]) << np.uint32(8))
            high = np.uint32(row[i + 6]) | (np.uint32(row[i + 9]) << np.uint32(8))
            packed[i] = low | (high << np.uint32(16))
        for tap in range(0, taps, 4):
            reds, greens, blues = read[0], read[1], read[2]
            red, green, blue = packed[3 * tap :], packed[3 * tap + 1 :], packed[3 * tap + 2 :]
            for x in range(to_width):
                reds[x] = red[start[x]]
                greens[x] = green[start[x]]
                blues[x] = blue[start[x]]
            w0, w1, w2, w3 = weight[tap], weight[tap + 1], weight[tap + 2], weight[tap + 3]
            for channel in range(3):
                fours, total = read[channel], sums[channel]
                for x in range(to_width):
                    four = fours[x]
                    so_far = np.int32(1 << (bits - 1)) if tap == 0 else total[x]
                    total[x] = (
                        so_far
                        + np.int32(four & np.uint32(255)) * np.int32(w0[x])
                        + np.int32((four >> np.uint32(8)) & np.uint32(255)) * np.int32(w1[x])
                        + np.int32((four >> np.uint32(16)) & np.uint32(255)) * np.int32(w2[x])
                        + np.int32(four >> np.uint32(24)) * np.int32(w3[x])
                    )
        for channel in range(3):
            total, target = sums[channel], out[channel, y]
            for x in range(to_width):
                target[x] = np.uint8(min(max(total[x] >> np.int32(bits), 0), 255))


def _down(
    planes: np.ndarray, first: np.ndarray, weight: np.ndarray, bits: int, tiles: np.ndarray
) -> None:
    """uint8 (C, H, columns W) -> (rows, columns, C, H', W). Compiled."""
    channels, height, width = planes.shape
    _, columns, _, tall, wide = tiles.shape
    last = np.uint64(height - 1)
    sums = np.empty(width, np.int32)
    for channel in range(channels):
        plane = planes[channel]
        for y in range(weight.shape[1]):
            for tap in range(0, weight.shape[0], 4):
                top = first[y] + np.uint64(tap)  # past the last row the weight is zero
                r0, r1 = plane[min(top, last)], plane[min(top + np.uint64(1), last)]
                r2 = plane[min(top + np.uint64(2), last)]
                r3 = plane[min(top + np.uint64(3), last)]
                w0, w1 = np.int32(weight[tap, y]), np.int32(weight[tap + 1, y])
                w2, w3 = np.int32(weight[tap + 2, y]), np.int32(weight[tap + 3, y])
                for x in range(width):
                    so_far = np.int32(1 << (bits - 1)) if tap == 0 else sums[x]
                    sums[x] = (
                        so_far
                        + np.int32(r0[x]) * w0
                        + np.int32(r1[x]) * w1
                        + np.int32(r2[x]) * w2
                        + np.int32(r3[x]) * w3
                    )
            for column in range(columns):
                part = sums[column * wide : (column + 1) * wide]
                target = tiles[y // tall, column, channel, y % tall]
                for x in range(wide):
                    target[x] = np.uint8(min(max(part[x] >> np.int32(bits), 0), 255))
