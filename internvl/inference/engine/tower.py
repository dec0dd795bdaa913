"""The vision tower over the tiles of many requests at a time."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from internvl.data.images import Triple
from internvl.models.vision import normalize_tiles


class Tower:
    """Turns tiles into visual tokens, requests in order."""

    def __init__(
        self,
        model: Any,
        statistics: tuple[Triple, Triple],
        most: int,
        *,
        compiled: bool = False,
    ) -> None:
        """See `Scheduler`; `most` tiles are looked at together.

        With `compiled`, the tower's blocks stay compiled.
        """
        self.model = model
        self.statistics = statistics
        self.most = most
        self.compiled = compiled
        if compiled:
            for block in model.model.vision_tower.encoder.layer:
                # Training may have compiled it already.
                if block._compiled_call_impl is None:
                    block.compile(dynamic=True)

    @torch.no_grad()
    def see(self, tiles: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Returns the visual tokens (V, D) of each request, None for one without images.

        Args:
            tiles: of each request, (N, 3, S, S), uint8 or, already normalized, float; or None.
        """
        present = [pixels for pixels in tiles if pixels is not None]
        if not present:
            return [None] * len(tiles)
        visual: list[Tensor] = []
        # Each request by itself: one may bring uint8 and the next tiles that are normalized.
        for group in _groups(torch.cat([self._normalized(t) for t in present]), self.most):
            # A lone tile twice: compiled code takes a batch of one for another shape.
            lone = self.compiled and len(group) == 1
            batch = group.repeat(2, 1, 1, 1) if lone else group
            features = self.model.model.get_image_features(pixel_values=batch)
            visual.append(features.pooler_output[: len(group)])
        tokens = torch.cat(visual)
        left = iter(tokens.flatten(0, 1).split([len(t) * tokens.shape[1] for t in present]))
        return [None if pixels is None else next(left) for pixels in tiles]

    def _normalized(self, tiles: Tensor) -> Tensor:
        # Moved as uint8, a quarter of the bytes of float32, and normalized on the device.
        tiles = tiles.to(self.model.device, non_blocking=True)
        if tiles.is_floating_point():
            return tiles.float()
        return normalize_tiles(tiles, torch.float32, *self.statistics)


def _groups(tiles: Tensor, most: int) -> Iterator[Tensor]:
    """Yields the tiles in as few groups of nearly equal size as have at most `most`."""
    yield from tiles.tensor_split(-(-len(tiles) // most))
