"""Dynamic resolution: chooses the grid of tiles of an image and cuts the tiles.

Original: `internvl_chat/internvl/train/dataset.py`, `dynamic_preprocess`.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from internvl.config import TilesConfig
from internvl.data import resample
from internvl.data.images import (
    QUALITIES,
    STATISTICS,
    Rgb,
    Triple,
    degrade,
    pad_square,
    size_of,
)
from internvl.data.records import Grid, Tiles


@lru_cache(maxsize=64)
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[Grid, ...]:
    """Returns all (columns, rows) of min_tiles…max_tiles tiles, fewest tiles first."""
    # A set filled in the original's order: its iteration order decides among grids of equal count,
    # which matters for exact ties if `min_tiles` is above 1. Not sorted, not a dict.
    grids = {
        (columns, rows)
        for bound in range(min_tiles, max_tiles + 1)
        for columns in range(1, bound + 1)
        for rows in range(1, min(bound, max_tiles // columns) + 1)
        if min_tiles <= columns * rows <= max_tiles
    }
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def choose_grid(width: int, height: int, *, min_tiles: int, max_tiles: int, tile_size: int) -> Grid:
    """Returns (columns, rows) nearest the image's aspect ratio; on a tie, more if pixels allow.

    width, height and tile_size are in pixels.

    >>> choose_grid(800, 1300, min_tiles=1, max_tiles=12, tile_size=448)
    (2, 3)
    >>> choose_grid(1920, 1080, min_tiles=1, max_tiles=12, tile_size=448)
    (4, 2)
    """
    aspect, area = width / height, width * height
    best, best_difference = (1, 1), float("inf")
    for columns, rows in candidate_grids(min_tiles, max_tiles):
        difference = abs(aspect - columns / rows)
        # A larger grid wins a tie only if the image has half of the pixels that it would show.
        large_enough = area > 0.5 * tile_size * tile_size * columns * rows
        if difference < best_difference or (difference == best_difference and large_enough):
            best, best_difference = (columns, rows), difference
    return best


def num_tiles(grid: Grid, thumbnail: bool) -> int:
    """Returns the number of tiles of a grid, its thumbnail included."""
    count = grid[0] * grid[1]
    # A thumbnail of a single tile would be that tile again.
    return count + 1 if thumbnail and count > 1 else count


def cut(
    image: Rgb, grid: Grid, *, tile_size: int, thumbnail: bool, resize: str = "pillow"
) -> Tensor:
    """Returns the tiles of an RGB image, uint8 (N, 3, S, S): row by row, then the thumbnail.

    Resizes the whole image to the grid (bicubic, aspect ratio not kept), then crops.
    """
    columns, rows = grid
    with_thumbnail = thumbnail and columns * rows > 1
    tiles = torch.empty(
        (columns * rows + with_thumbnail, 3, tile_size, tile_size), dtype=torch.uint8
    )
    pixels = np.ascontiguousarray(image)
    _resize_into(tiles[: columns * rows].unflatten(0, (rows, columns)), pixels, resize)
    if with_thumbnail:
        _resize_into(tiles[-1:].unflatten(0, (1, 1)), pixels, resize)
    return tiles


def _resize_into(tiles: Tensor, pixels: np.ndarray, backend: str) -> None:
    """Resizes `pixels`, uint8 (H, W, 3), into `tiles`, uint8 (rows, columns, 3, S, S).

    By Pillow's bicubic or torch's antialiased one (`backend`), compiled if numba is installed.
    """
    rows, columns, _, size, _ = tiles.shape
    width, height = columns * size, rows * size
    compiled = resample.compiled_resize(width, height, backend)
    if compiled is not None:
        compiled(pixels, tiles.numpy())
    elif backend == "pillow":
        resized = Image.fromarray(pixels).resize((width, height))
        # Plane by plane: saves a transposed copy of the whole, and copies runs of S bytes.
        for channel, plane in enumerate(resized.split()):
            cells = np.asarray(plane).reshape(rows, size, columns, size)
            tiles.numpy()[:, :, channel] = cells.swapaxes(1, 2)
    else:
        whole = resample.resize_by_torch(pixels, width, height)
        cells = whole.unflatten(1, (rows, size)).unflatten(3, (columns, size))
        tiles.copy_(cells.permute(1, 3, 0, 2, 4))


def choose_grids(
    sizes: Sequence[tuple[int, int]], config: TilesConfig, max_tiles: int
) -> tuple[Grid, ...]:
    """Returns the grid of each of a sample's images, from their (width, height) in pixels.

    Several images share the budget: each gets at most max(1, max_tiles // number of images).
    """
    most = max(1, max_tiles // max(1, len(sizes)))
    return tuple(
        choose_grid(
            width,
            height,
            # Many images leave less than the configured minimum for each.
            min_tiles=min(config.min, most),
            max_tiles=most,
            tile_size=config.size,
        )
        for width, height in sizes
    )


def tile_images(
    images: Sequence[Rgb],
    config: TilesConfig,
    max_tiles: int,
    *,
    resize: str = "pillow",
    mean: Triple = STATISTICS["imagenet"][0],
    augment: np.random.Generator | None = None,
) -> Tiles | None:
    """Cuts the RGB images of a sample into tiles; returns None without images.

    Args:
        resize: "pillow" or "torch".
        mean: colour of the padding if `config.pad_square`, RGB in 0…1.
        augment: draws the JPEG quality of every tile; None leaves them as they are.
    """
    if not images:
        return None
    arrays = [np.asarray(image) for image in images]
    grids = choose_grids([size_of(array) for array in arrays], config, max_tiles)
    # As in the original, an image that is never tiled is degraded before its resize, not padded.
    if config.max == 1 and augment is not None:
        arrays = [
            np.asarray(degrade(Image.fromarray(array), _quality(augment))) for array in arrays
        ]
    elif config.pad_square:
        arrays = [np.asarray(pad_square(Image.fromarray(p), mean)) for p in arrays]
    tiles_of_images = [
        cut(array, grid, tile_size=config.size, thumbnail=config.thumbnail, resize=resize)
        for array, grid in zip(arrays, grids, strict=True)
    ]
    # `cat` would copy a single tensor, too.
    pixels = tiles_of_images[0] if len(tiles_of_images) == 1 else torch.cat(tiles_of_images)
    if config.max > 1 and augment is not None:
        pixels = degrade_tiles(pixels, [_quality(augment) for _ in pixels])
    return Tiles(pixels, tuple(map(len, tiles_of_images)), grids)


def _quality(draw: np.random.Generator) -> int:
    return int(draw.integers(QUALITIES.start, QUALITIES.stop))


def empty_tiles(
    sizes: Sequence[tuple[int, int]], config: TilesConfig, max_tiles: int
) -> Tiles | None:
    """Returns the counts and grids of `tile_images` with S = 0: decodes and resizes nothing."""
    if not sizes:
        return None
    grids = choose_grids(sizes, config, max_tiles)
    per_image = tuple(num_tiles(grid, config.thumbnail) for grid in grids)
    return Tiles(torch.empty(sum(per_image), 3, 0, 0, dtype=torch.uint8), per_image, grids)


def degrade_tiles(tiles: Tensor, qualities: Sequence[int]) -> Tensor:
    """Degrades each of the tiles, uint8 (N, 3, S, S), by JPEG at its quality."""
    degraded = [
        np.asarray(degrade(Image.fromarray(tile.permute(1, 2, 0).numpy()), quality))
        for tile, quality in zip(tiles, qualities, strict=True)
    ]
    return torch.from_numpy(np.stack(degraded)).permute(0, 3, 1, 2).contiguous()
