"""The model of an index, loaded when it is first needed: features of squares, texts and images."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from internvl.data.pairs import clean_caption, square
from internvl.errors import UserError
from internvl.inference.dual import Dual
from internvl.models.dual.model import Mode
from internvl.models.vision import normalize_tiles
from internvl.search.scan import upright
from internvl.search.store import Settings

SAME_MODEL = 0.995
"""Least cosine of the probes' features, which 16 bits in place of 32 change a little."""

_PROBE_TEXT = "a photo of a red panda"


class Encoder:
    """Encodes with a model that `load` gives."""

    def __init__(self, load: Callable[[], Dual], settings: Settings | None = None) -> None:
        """
        Args:
            settings: of the index that the features must fit.
        """
        self._load = load
        self._settings = settings

    @cached_property
    def dual(self) -> Dual:
        """The model. Raises UserError if the index is of other weights."""
        dual = self._load()
        if self._settings is not None:
            _check_probe(dual, self._settings)
        return dual

    def new_settings(
        self,
        folder: Path,
        model: str,
        step: int | None,
        base: list[str],
        modes: list[str],
        dtype: str = "float16",
    ) -> Settings:
        """Returns the settings of a new index, see there."""
        if not modes or set(modes) - {"c", "g"}:
            raise UserError(f"--mode is c, g or c,g, not {','.join(modes)!r}")
        if "g" in modes and not self.dual.model.num_queries:
            raise UserError(f"{model}: holds InternVL-C alone; index with --mode c")
        self._settings = Settings(
            folder=str(folder),
            model=model,
            step=step,
            base=base,  # of a moved run, which would miss it again
            modes=modes,
            dtype=dtype,
            width=self.dual.model.config.embed_dim,
            image_size=self.dual.image_size,
            probe=_probe(self.dual),
        )
        return self._settings

    def squares(self, pixels: Sequence[Tensor], modes: Sequence[str]) -> dict[str, np.ndarray]:
        """Embeds squares, uint8 (3, S, S): mode -> float32 (B, E).

        Raises:
            UserError: a feature is not finite.
        """
        modes = cast("Sequence[Mode]", modes)
        features = self.dual.encode_images_of(self._normalized(pixels), modes)
        # NaN has no order: a search would end anywhere.
        if not all(torch.isfinite(rows).all() for rows in features.values()):
            raise UserError(
                "the features hold no finite numbers: the weights diverged, or their type has too "
                "small a range (try --dtype float32)"
            )
        return {mode: rows.numpy() for mode, rows in features.items()}

    def image(self, image: bytes | Path, mode: str) -> Tensor:
        """Embeds an image, upright as its EXIF says: float32 (E,). Raises BadImage."""
        pixels = square(upright(image), self.dual.image_size)
        return torch.from_numpy(self.squares([pixels], [mode])[mode][0])

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeds texts, cleaned as `evaluate` does: float32 (R, E)."""
        # So that a search finds what `evaluate` counts as found.
        cleaned = [clean_caption(text) for text in texts]
        for text, words in zip(texts, cleaned, strict=True):
            if not words:
                raise UserError(f"{text!r} has no words to look for")
        return self.dual.encode_texts(cleaned)

    def match(self, pixels: Sequence[Tensor], text: str) -> list[float]:
        """Returns the probability that a text matches, per square."""
        images = self._normalized(pixels)
        return cast("list[float]", self.dual.match(images, [text] * len(pixels)).tolist())

    def _normalized(self, pixels: Sequence[Tensor]) -> Tensor:
        # Moved as uint8, and normalized on the device.
        return normalize_tiles(torch.stack([*pixels]).to(self.dual.device), self.dual.dtype)


def _probe(dual: Dual) -> dict[str, list[float]]:
    """Returns the features of a fixed text, and of a fixed image."""
    # Smooth, so that a resize to any size leaves it alike.
    rows, columns = np.indices((64, 64), np.uint8)
    image = Image.fromarray(np.stack([rows * 4, columns * 4, rows * 2 + columns], axis=2))
    features = {"text": dual.encode_texts(_PROBE_TEXT), "image": dual.encode_images(image)}
    return {name: rows[0].tolist() for name, rows in features.items()}


def _check_probe(dual: Dual, settings: Settings) -> None:
    for name, feature in _probe(dual).items():
        cosine = float(np.dot(feature, settings.probe[name]))
        if not cosine > SAME_MODEL:
            raise UserError(
                f"the index was made with {settings.model}, and {dual.folder} is another model "
                f"or has changed since (features of the same {name}: cosine {cosine:.3f}); give "
                "the same --model, or index the photos again into another folder"
            )
