"""Shared by both families: normalization of tiles, stochastic depth, parameter counts."""

import torch
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration

from internvl.models.weights import resize_positions

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize_tiles(
    tiles: Tensor,
    dtype: torch.dtype,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Tensor:
    """Normalizes uint8 tiles (N, 3, S, S) on their device; returns `dtype` of the same shape."""
    shape = (1, 3, 1, 1)
    # In float32: bfloat16 has 8 significant bits, so that rounding each step would change pixels.
    pixels = tiles.to(torch.float32) / 255
    pixels = (pixels - pixels.new_tensor(mean).view(shape)) / pixels.new_tensor(std).view(shape)
    return pixels.to(dtype)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Returns the numbers of (trainable, all) parameters; a shared one counts once."""
    sizes = [(p.requires_grad, p.numel()) for p in model.parameters()]
    return sum(size for trained, size in sizes if trained), sum(size for _, size in sizes)


class DropPath(nn.Module):
    """Stochastic depth: in training, drops a sample's residual with probability `rate`."""

    probability: Tensor

    def __init__(self, rate: float, device: torch.device) -> None:
        super().__init__()
        self.rate = rate
        # A tensor: torch.compile takes a number for a constant, and would build code for every
        # rate, which is for every block. On the meta device it would have no value.
        home = torch.device("cpu") if device.type == "meta" else device
        probability = torch.tensor(rate, dtype=torch.float32, device=home)
        self.register_buffer("probability", probability, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, D): whole samples are zero, the others scaled by 1 / (1 - rate)."""
        if not self.training:
            return hidden
        survival = 1 - self.probability.float()
        shape = (hidden.shape[0], *[1] * (hidden.dim() - 1))
        drawn = torch.rand(shape, dtype=torch.float32, device=hidden.device)
        # Scaled in float32: a scale that bfloat16 has rounded would change the mean.
        return (hidden * ((drawn < survival) / survival)).to(hidden.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def is_random(*modules: nn.Module) -> bool:
    """Returns whether modules draw random numbers in training."""
    inner = [module for outer in modules for module in outer.modules()]
    return any(
        (isinstance(module, DropPath) and module.rate > 0)
        or (isinstance(module, nn.Dropout) and module.p > 0)
        # Attention drops its weights by this rate, without a module.
        or getattr(module, "attention_dropout", 0.0) > 0
        for module in inner
    )


def set_drop_path(model: InternVLForConditionalGeneration, rate: float) -> None:
    """Sets stochastic depth in the vision tower: 0 in the first block, `rate` in the last."""
    # It replaces the two dropouts of a block, which no released model uses. LayerScale follows them
    # and is per channel, so dropping before it equals dropping after it.
    blocks = model.model.vision_tower.encoder.layer
    for block, block_rate in zip(
        blocks, torch.linspace(0, rate, len(blocks)).tolist(), strict=True
    ):
        device = block.lambda_1.device
        for module, name in ((block.attention, "projection_dropout"), (block, "dropout")):
            # The first block drops nothing, and draws for that too: then all are one compiled code.
            dropping = DropPath(block_rate, device) if rate else nn.Dropout(0.0)
            module.set_submodule(name, dropping)
        block.train(block.training)


def resize_tower(model: InternVLForConditionalGeneration, side: int) -> None:
    """Resizes the vision tower's position embeddings in place, to tiles of `side` px."""
    tower = model.model.vision_tower
    embeddings, patches = tower.embeddings, tower.embeddings.patch_embeddings
    grid = side // patches.patch_size[0]
    table = embeddings.position_embeddings
    resized = resize_positions(table.detach(), grid**2)
    embeddings.position_embeddings = nn.Parameter(resized, requires_grad=table.requires_grad)
    patches.num_patches, patches.patch_shape = grid**2, (grid, grid)
    for module in (embeddings, patches, tower.config, model.config.vision_config):
        module.image_size = (side, side)
