"""Images that differ, for tests of retrieval and classification."""

from pathlib import Path

import numpy as np
from PIL import Image

COLORS = ("red", "green", "blue", "gray", "purple", "orange", "black", "yellow", "white", "pink")


def photo(path: Path, seed: int, size: tuple[int, int] = (80, 60)) -> None:
    """An image of soft coloured patches, another for every seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
