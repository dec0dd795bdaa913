"""The chat model: `transformers`' InternVL plus what training needs of its forward."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import InternVLForConditionalGeneration
from transformers.models.internvl.modeling_internvl import InternVLCausalLMOutputWithPast

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Supervision:
    """What a packed row is trained on: `positions[m]` predicts `targets[m]`.

    positions, targets: int64 (M,); weights: float32 (M,). Positions may repeat.
    """

    positions: Tensor
    targets: Tensor
    weights: Tensor


class ChatModel(InternVLForConditionalGeneration):
    """`InternVLForConditionalGeneration` whose forward can also return a summed loss.

    Same modules, names and configuration: what it saves, plain `transformers` loads.
    """

    loss_chunk = 4096
    """Supervised positions whose logits exist at the same time."""

    def forward(
        self, *args: Any, supervision: Supervision | None = None, **kwargs: Any
    ) -> InternVLCausalLMOutputWithPast:
        """As the parent's; with `supervision`, `loss` is the weighted SUM over its positions.

        Logits are then computed at those positions only, a chunk at a time, and not returned.
        """
        if supervision is None:
            return super().forward(*args, **kwargs)
        hidden = self.model(*args, use_cache=False, **kwargs).last_hidden_state[0]
        hidden = hidden.index_select(0, supervision.positions)
        loss = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), self.loss_chunk):
            part = slice(start, start + self.loss_chunk)
            terms = (hidden[part], supervision.targets[part], supervision.weights[part])
            loss = loss + checkpoint(self._chunk_loss, *terms, use_reentrant=False)
        return InternVLCausalLMOutputWithPast(loss=loss)

    def _chunk_loss(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        each = F.cross_entropy(self.lm_head(hidden).float(), targets, reduction="none")
        return (each * weights).sum()


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
