"""Patch embedding as one matrix product.

cuDNN has no fast kernel for three channels in bfloat16: on an H200 its convolution took 1 % of a
training step of InternVL2-2B for 0.1 % of the FLOPs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from internvl.models.modules import replace_module

_PROJECTION = "embeddings.patch_embeddings.projection"

_ALIGNED = 8
"""Fast products take rows of a multiple of this many 16-bit numbers; a patch has 3 x 14 x 14."""


class PatchProjection(nn.Conv2d):
    """A convolution whose stride is its kernel's side, as a product; weights keep their names."""

    always = False
    """Whether evaluation on a GPU computes the product too, inside `products`."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D, H / P, W / P)."""
        # Not in evaluation otherwise: answers are those of plain `transformers`, bit for bit.
        fast = self.training or self.always
        return self.product(input) if fast and input.is_cuda else super().forward(input)

    def product(self, input: Tensor) -> Tensor:
        """As `forward`, on any device."""
        channels, height, width = input.shape[1:]
        (side_y, side_x), size = self.kernel_size, self.weight[0].numel()
        rows, columns = height // side_y, width // side_x
        patches = input.reshape(-1, channels, rows, side_y, columns, side_x)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(-1, rows, columns, size)
        missing = -size % _ALIGNED
        patches, weight = (F.pad(t, (0, missing)) for t in (patches, self.weight.flatten(1)))
        return F.linear(patches, weight, self.bias).permute(0, 3, 1, 2)


@contextmanager
def products(tower: nn.Module) -> Iterator[None]:
    """Inside, a tower whose projection was replaced computes the product in evaluation too."""
    projection = tower.get_submodule(_PROJECTION)
    if not isinstance(projection, PatchProjection):
        yield
        return
    projection.always = True
    try:
        yield
    finally:
        projection.always = False


def enable(tower: nn.Module) -> None:
    """Replaces the convolution of a tower's patch embedding by a `PatchProjection`."""
    replace_module(tower, _PROJECTION, PatchProjection)
