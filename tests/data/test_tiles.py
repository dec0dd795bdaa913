"""Tiling against the original's grids and pixels."""

import json

import numpy as np
import PIL
import pytest
import torch
from chat_folders import GOLDEN
from PIL import Image
from safetensors.torch import load_file

from internvl.config import TilesConfig
from internvl.data import tiles

CASE = json.loads((GOLDEN / "dynamic_tiles" / "case.json").read_text())
GRIDS = json.loads((GOLDEN / "dynamic_tiles" / "grids.json").read_text())["rows"]
PIXELS = load_file(GOLDEN / "dynamic_tiles" / "images.safetensors")


def setting(key):
    """("1-6@448") -> the arguments of choose_grid."""
    bounds, _, size = key.partition("@")
    least, most = map(int, bounds.split("-"))
    return {"min_tiles": least, "max_tiles": most, "tile_size": int(size or 448)}


def test_golden_grids():
    checked = 0
    for row in GRIDS:
        for key in row.keys() - {"w", "h"}:
            grid = tiles.choose_grid(row["w"], row["h"], **setting(key))
            counts = [tiles.num_tiles(grid, thumbnail) for thumbnail in (False, True)]
            assert [*grid, *counts] == row[key], (row["w"], row["h"], key)
            checked += 1
    assert checked == len(GRIDS) * 13 == 1300


def test_golden_order_where_ties_matter():
    """Above one tile at least, the original's answer depends on the order of a Python set."""
    cases = json.loads((GOLDEN / "dynamic_tiles" / "order_sensitive.json").read_text())["rows"]
    assert len(cases) == 11
    for key, width, height, grid, *_ in cases:
        assert tiles.choose_grid(width, height, **setting(key)) == tuple(grid)
    orders = json.loads((GOLDEN / "dynamic_tiles" / "target_ratios_order.json").read_text())
    for key, order in orders["orders"].items():
        least, most = map(int, key.split("-"))
        assert [list(grid) for grid in tiles.candidate_grids(least, most)] == order


def original_grid(width, height, least, most, size):
    """The rule of the spec, written the long way."""
    best, difference = (1, 1), float("inf")
    for i, j in tiles.candidate_grids(least, most):
        d = abs(width / height - i / j)
        if d < difference:
            best, difference = (i, j), d
        elif d == difference and width * height > 0.5 * size * size * i * j:
            best = (i, j)
    return best


@pytest.mark.parametrize("most", [1, 6, 12, 24])
def test_every_size_up_to_a_bound(most):
    for width in range(7, 1400, 37):
        for height in range(5, 1400, 41):
            found = tiles.choose_grid(width, height, min_tiles=1, max_tiles=most, tile_size=448)
            assert found == original_grid(width, height, 1, most, 448)


@pytest.mark.parametrize("case", CASE["images"], ids=lambda case: f"{case['w']}x{case['h']}")
def test_golden_pixels(case):
    if case["h"] > 5 * case["w"] and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("the golden tiles are Pillow 13's, which shrinks the height of this one first")
    name = f"image{case['image']}"
    raw = PIXELS.get(f"{name}.raw", PIXELS[f"{name}.pixels"])
    image = Image.fromarray(raw.numpy()).convert("RGB")
    config = TilesConfig(
        size=case["image_size"],
        min=case["min_num"],
        max=case["max_num"],
        thumbnail=case["use_thumbnail"],
    )
    found = tiles.tile_images([image], config, config.max)
    assert found is not None
    assert found.pixels.dtype == torch.uint8
    assert torch.equal(found.pixels.permute(0, 2, 3, 1), PIXELS[f"{name}.tiles"])
    assert found.per_image == (case["n_tiles"],)


def test_several_images_share_the_budget():
    images = [Image.new("RGB", (400, 100)) for _ in range(3)]
    config = TilesConfig(size=28, max=12)
    assert tiles.tile_images(images, config, 12).per_image == (5, 5, 5)  # 12 // 3, and a thumbnail
    assert tiles.tile_images(images * 5, config, 12).per_image == (1,) * 15
    assert tiles.tile_images([], config, 12) is None


def test_empty_tiles_count_the_same():
    sizes = [(400, 100), (90, 300)]
    images = [Image.new("RGB", size) for size in sizes]
    config = TilesConfig(size=28)
    full, empty = (
        f(x, config, 12) for f, x in ((tiles.tile_images, images), (tiles.empty_tiles, sizes))
    )
    assert (full.per_image, full.grids) == (empty.per_image, empty.grids)
    assert empty.pixels.shape == (sum(full.per_image), 3, 0, 0)


def test_a_grid_never_exceeds_the_budget():
    rng = np.random.default_rng(0)
    for width, height in rng.integers(1, 5000, (500, 2)).tolist():
        columns, rows = tiles.choose_grid(width, height, min_tiles=3, max_tiles=12, tile_size=448)
        assert columns * rows <= 12
