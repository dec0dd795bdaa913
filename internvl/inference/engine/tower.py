"""The vision tower over the tiles of many requests at a time."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from internvl.data.images import Triple
from internvl.models import kernels
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
        self.copies: torch.cuda.Stream | None = None
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
        for group in _groups(self._moved(present), self.most):
            # A lone tile twice: compiled code takes a batch of one for another shape.
            lone = self.compiled and len(group) == 1
            batch = self._normalized(group.repeat(2, 1, 1, 1) if lone else group)
            with self._fast_layers():
                features = self.model.vision_tokens(batch)
            visual.append(features[: len(group)])
        tokens = torch.cat(visual)
        left = iter(tokens.flatten(0, 1).split([len(t) * tokens.shape[1] for t in present]))
        return [None if pixels is None else next(left) for pixels in tiles]

    def _fast_layers(self) -> AbstractContextManager[None]:
        """Inside, the tower's layers take their fast forms, as compiled blocks do."""
        tower = self.model.model.vision_tower
        return kernels.patch_products(tower) if self.compiled else nullcontext()

    def _moved(self, present: Sequence[Tensor]) -> Tensor:
        """Returns all tiles on the device, one after the other."""
        device = self.model.device
        if any(t.is_floating_point() for t in present):
            # Each request by itself: one may bring uint8 and the next tiles that are normalized.
            present = [self._normalized(t.to(device, non_blocking=True)) for t in present]
        if device.type != "cuda" or present[0].is_cuda:
            return torch.cat(list(present))
        sizes = [len(t) for t in present]
        # A stream of its own: what was begun before goes on while the tiles are copied.
        self.copies = self.copies or torch.cuda.Stream(device)
        with torch.cuda.stream(self.copies):
            moved = torch.empty(
                (sum(sizes), *present[0].shape[1:]), dtype=torch.uint8, device=device
            )
            for target, source in zip(moved.split(sizes), present, strict=True):
                target.copy_(source, non_blocking=True)
        current = torch.cuda.current_stream(device)
        current.wait_stream(self.copies)
        moved.record_stream(current)
        return moved

    def _normalized(self, tiles: Tensor) -> Tensor:
        if tiles.is_floating_point():
            return tiles.float()
        # Moved as uint8, a quarter of the bytes of float32, and normalized on the device.
        return normalize_tiles(tiles, torch.float32, *self.statistics)


def _groups(tiles: Tensor, most: int) -> Iterator[Tensor]:
    """Yields the tiles in as few groups of nearly equal size as have at most `most`."""
    yield from tiles.tensor_split(-(-len(tiles) // most))
