"""What both families share: normalized tiles, stochastic depth, parameter counts."""

import torch
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration

IMAGENET_MEAN = (0.485, 0.456, 0.406)


IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize_tiles(
    tiles: Tensor,
    dtype: torch.dtype,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Tensor:
    """uint8 (N, 3, S, S) on any device -> normalized (N, 3, S, S), computed in float32."""
    shape = (1, 3, 1, 1)
    pixels = tiles.to(torch.float32) / 255
    pixels = (pixels - pixels.new_tensor(mean).view(shape)) / pixels.new_tensor(std).view(shape)
    return pixels.to(dtype)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters; one that several modules share counts once."""
    sizes = [(p.requires_grad, p.numel()) for p in model.parameters()]
    return sum(size for trained, size in sizes if trained), sum(size for _, size in sizes)


class DropPath(nn.Module):
    """Stochastic depth: in training a sample's residual is dropped with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, D), some samples zero and the others scaled by 1 / (1 - rate)."""
        if not self.training or self.rate == 0:
            return hidden
        kept = hidden.new_empty(hidden.shape[0], *[1] * (hidden.dim() - 1))
        return hidden * kept.bernoulli_(1 - self.rate) / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def set_drop_path(model: InternVLForConditionalGeneration, rate: float) -> None:
    """Stochastic depth in the vision tower, from 0 in the first block to `rate` in the last.

    It takes the place of the tower's two dropouts, which no released model uses: LayerScale comes
    after them and is per channel, so that dropping before it or after it is the same.
    """
    blocks = model.model.vision_tower.encoder.layer
    for block, block_rate in zip(
        blocks, torch.linspace(0, rate, len(blocks)).tolist(), strict=True
    ):
        block.attention.set_submodule("projection_dropout", DropPath(block_rate))
        block.set_submodule("dropout", DropPath(block_rate))
        block.train(block.training)
