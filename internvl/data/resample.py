"""Bicubic resizes of RGB, bit-identical to Pillow's and torch's, compiled by numba if installed.

Both round the weights to fixed point (Pillow: 22 fractional bits of int32; torch: int16 in all) and
round to bytes between their two passes, so a resize is a few integer sums. Here they run over a
whole row at once and write straight into the tiles. Originals: Pillow's
`src/libImaging/Resample.c`, torch's `UpSampleKernelAVXAntialias.h`.
"""

import importlib
import itertools
import logging
import os
import threading
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from internvl.files import first_line

logger = logging.getLogger(__name__)

_LEAST_PIXELS = 1 << 16  # a smaller target takes Pillow no time worth saving
_COMPILE_AFTER = 100  # resizes of a process before it compiles, which takes seconds

_num_resizes = itertools.count()

Weights = tuple[np.ndarray, np.ndarray, int]
Resize = Callable[[np.ndarray, np.ndarray], None]


def compiled_resize(width: int, height: int, backend: str) -> Resize | None:
    """Returns a compiled resize to `width` x `height` pixels, equal to that of `backend`.

    It takes an RGB image, uint8 (H, W, 3), and fills tiles, uint8 (rows, columns, 3, S, S). Returns
    None without numba, for small targets, and for the first resizes of a process, until a thread
    has compiled it.

    Args:
        backend: "pillow" or "torch".
    """
    if width * height < _LEAST_PIXELS or next(_num_resizes) < _COMPILE_AFTER:
        return None
    compilation = _compilations.get(backend)
    if compilation is None:
        compilation = _Compilation(backend)
        # Several threads may come here at once; one of theirs is kept.
        if _compilations.setdefault(backend, compilation) is compilation:
            compilation.start()
    return compilation.resize


def resize_by_torch(image: np.ndarray, width: int, height: int) -> Tensor:
    """Resizes uint8 (H, W, 3) to (3, height, width): antialiased, in Pillow's order of passes."""
    # Channels last in memory: the layout of torch's vectorized kernel.
    pixels = torch.from_numpy(np.require(image, requirements="W")).permute(2, 0, 1)[None]
    from_height, from_width, _ = image.shape
    if height_first((from_width, from_height), (width, height)):
        pixels = F.interpolate(pixels, (height, from_width), mode="bicubic", antialias=True)
    return F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)[0]


def height_first(size: tuple[int, int], to_size: tuple[int, int]) -> bool:
    """True if Pillow resizes `size` to `to_size`, both (W, H), with the vertical pass first."""
    # The rounding between the passes makes their order visible. Pillow 13 shrinks the height first
    # if that saves most; earlier versions always begin with the width.
    (width, height), (to_width, to_height) = size, to_size
    return height - to_height > max(0, 2 * (width - to_width)) and _may_begin_with_height()


@cache
def _may_begin_with_height() -> bool:
    """True if the installed Pillow ever begins with the height; probed by a tall image."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 40, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    height_then_width = image.resize((40, 30)).resize((20, 30))
    return image.resize((20, 30)).tobytes() == height_then_width.tobytes()


class _Compilation(threading.Thread):
    """Compiles a resize beside those who need it: all readers of a GPU would wait at once."""

    def __init__(self, backend: str) -> None:
        super().__init__(name="compile a resize")
        self.backend = backend
        self.resize: Resize | None = None
        """None until it is there."""

    def start(self) -> None:
        """Begins; a process that is forked waits for the end."""
        # Numba's lock would be held there for ever, by a thread that is not.
        os.register_at_fork(before=self._finish)
        super().start()

    def run(self) -> None:
        """See `Thread`."""
        try:
            self.resize = _checked_resize(self.backend)
        # A broken installation of numba or llvmlite; a missing one is no error.
        except (OSError, RuntimeError, AttributeError) as error:
            logger.warning(
                "numba cannot compile the resize (%s: %s), so that of %s is used, which takes "
                "longer; pip install --force-reinstall numba",
                *(type(error).__name__, first_line(error), self.backend),
            )

    def _finish(self) -> None:
        if self.is_alive():
            self.join()


_compilations: dict[str, _Compilation] = {}


def _checked_resize(backend: str) -> Resize | None:
    """Returns the compiled resize if numba is installed and it equals this Pillow or torch."""
    try:
        numba = importlib.import_module("numba")
    except ImportError:
        return None
    compiled = numba.njit(nogil=True)
    resize = _Resize(compiled(_horizontal_pass), compiled(_vertical_pass), backend)
    draw = np.random.default_rng(0)
    # To 96 x 48: both shrunk (by Pillow 13 the height first, then the width), both grown, one each.
    for height, width in ((220, 70), (120, 200), (30, 20), (200, 30), (40, 120)):
        image = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        tiles = np.empty((2, 1, 3, 48, 48), dtype=np.uint8)
        resize(image, tiles)
        if backend == "pillow":
            expected = np.asarray(Image.fromarray(image).resize((48, 96)))
        else:
            expected = resize_by_torch(image, 48, 96).permute(1, 2, 0).numpy()
        if not np.array_equal(tiles.transpose(0, 3, 1, 4, 2).reshape(96, 48, 3), expected):
            logger.debug("the compiled resize differs from %s, which is used instead", backend)
            return None
    return resize


class _Resize:
    """Runs the two compiled passes in the order that Pillow would."""

    def __init__(self, horizontal: Any, vertical: Any, backend: str) -> None:
        self.horizontal = horizontal
        self.vertical = vertical
        self.backend = backend

    def __call__(self, image: np.ndarray, tiles: np.ndarray) -> None:
        rows, columns, _, size, _ = tiles.shape
        height, width, _ = image.shape
        to_width, to_height = columns * size, rows * size
        if height_first((width, height), (to_width, to_height)):
            image = self._resize_height(image, to_height)
            height = to_height
        # Bytes, not int32, between the passes: Pillow and torch round here, too.
        middle = np.empty((3, height, to_width), dtype=np.uint8)
        self.horizontal(_read_only(image), *_weights(width, to_width, self.backend), middle)
        self.vertical(_read_only(middle), *_weights(height, to_height, self.backend), tiles)

    def _resize_height(self, image: np.ndarray, to_height: int) -> np.ndarray:
        """Returns uint8 (to_height, W, 3): the vertical pass alone."""
        height, width, _ = image.shape
        # Interleaved RGB rows are one plane of width 3 W: the weights do not depend on the column.
        resized = np.empty((to_height, width, 3), dtype=np.uint8)
        tile = resized.reshape(1, 1, 1, to_height, width * 3)
        plane = _read_only(image.reshape(1, height, width * 3))
        self.vertical(plane, *_weights(height, to_height, self.backend), tile)
        return resized


def _read_only(array: np.ndarray) -> np.ndarray:
    """Returns a read-only view."""
    # Arrays of Pillow images are read-only, which is a signature of its own to numba.
    view = array.view()
    view.flags.writeable = False
    return view


@lru_cache(maxsize=4096)
def _weights(size: int, to_size: int, backend: str) -> Weights:
    """Returns (first, weights, bits) of a resize of one side from `size` to `to_size` pixels.

    `first`, uint64 (to_size,), is the first source pixel of each target; `weights` (taps, to_size)
    are fixed-point numbers with `bits` fractional bits: int32 with 22 for Pillow, int16 with as
    many as the largest weight leaves for torch. Taps that a target does not need weigh 0.
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
    for column in weight.T:  # not `sum`, which adds pairwise: other last bits than C's loop
        total = total + column
    weight = weight / total[:, None]
    bits = 22  # Pillow: 32 bits less 8 of the pixel and 2 for sums beyond 255
    if backend == "torch":
        bits = 14
        while int(0.5 + weight.max() * (1 << (bits + 1))) < 1 << 15:
            bits += 1
    half = np.where(weight < 0, -0.5, 0.5)
    fixed = np.trunc(half + weight * (1 << bits)).astype(
        np.int16 if backend == "torch" else np.int32
    )
    return first.astype(np.uint64), np.ascontiguousarray(fixed.T), bits


def _bicubic(x: np.ndarray) -> np.ndarray:
    a = -0.5  # Pillow's; torch has it when it antialiases, -0.75 otherwise
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _horizontal_pass(
    image: np.ndarray, first: np.ndarray, weight: np.ndarray, bits: int, out: np.ndarray
) -> None:
    """Resizes uint8 (H, W, 3) to `out`, (3, H, to_width). Compiled by numba."""
    height, width, _ = image.shape
    taps, to_width = weight.shape
    lines = image.reshape(height, width * 3)
    row = np.zeros((width + taps) * 3, np.uint8)  # black to the right: weighted with zero
    # Each byte with those of the three pixels to its right: a target reads four taps at once.
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
                    # Half of the last bit: the shift below then rounds to the nearest.
                    start_sum = np.int32(1 << (bits - 1)) if tap == 0 else total[x]
                    total[x] = (
                        start_sum
                        + np.int32(four & np.uint32(255)) * np.int32(w0[x])
                        + np.int32((four >> np.uint32(8)) & np.uint32(255)) * np.int32(w1[x])
                        + np.int32((four >> np.uint32(16)) & np.uint32(255)) * np.int32(w2[x])
                        + np.int32(four >> np.uint32(24)) * np.int32(w3[x])
                    )
        for channel in range(3):
            total, target = sums[channel], out[channel, y]
            for x in range(to_width):
                target[x] = np.uint8(min(max(total[x] >> np.int32(bits), 0), 255))


def _vertical_pass(
    planes: np.ndarray, first: np.ndarray, weight: np.ndarray, bits: int, tiles: np.ndarray
) -> None:
    """Resizes uint8 (C, H, columns W) to `tiles`, (rows, columns, C, H', W). Compiled by numba."""
    channels, height, width = planes.shape
    _, columns, _, tile_height, tile_width = tiles.shape
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
                    start_sum = np.int32(1 << (bits - 1)) if tap == 0 else sums[x]
                    sums[x] = (
                        start_sum
                        + np.int32(r0[x]) * w0
                        + np.int32(r1[x]) * w1
                        + np.int32(r2[x]) * w2
                        + np.int32(r3[x]) * w3
                    )
            for column in range(columns):
                tile_sums = sums[column * tile_width : (column + 1) * tile_width]
                target = tiles[y // tile_height, column, channel, y % tile_height]
                for x in range(tile_width):
                    target[x] = np.uint8(min(max(tile_sums[x] >> np.int32(bits), 0), 255))
