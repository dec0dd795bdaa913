"""LoRA's dropout with masks that several layers use and that a backward pass can apply."""

import torch
from torch import Tensor, nn

from internvl.models.adapters import seeded_dropout


class DrawnDropout(nn.Module):
    """Dropout whose mask layers that share the input can take over, and a backward pass apply."""

    def __init__(self, rate: float, *, keep: bool = False) -> None:
        super().__init__()
        self.rate = rate
        self.keep = keep
        """Whether `RepeatedDropout` layers wait for the mask."""
        self.dropped: Tensor | None = None

    def draw(self, inputs: Tensor) -> Tensor:
        """bool, of the same shape: what becomes zero."""
        return self._drawn(torch.empty_like(inputs, dtype=torch.bool).bernoulli_(self.rate))

    def draw_seed(self, inputs: Tensor) -> Tensor:
        """What seeded_dropout.py's kernels make the mask of, int32 (2,)."""
        return self._drawn(seeded_dropout.seed(inputs.device))

    def _drawn(self, mask: Tensor) -> Tensor:
        self.dropped = mask if self.keep else None
        return mask

    def forward(self, inputs: Tensor) -> Tensor:
        """Any shape -> the same, some entries zero and the others scaled by 1 / (1 - rate)."""
        if not self.training or self.rate == 0:
            return inputs
        return inputs.masked_fill(self.draw(inputs), 0) / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class RepeatedDropout(nn.Module):
    """The mask that `first` drew in this forward; the last to use it lets it go."""

    def __init__(self, first: DrawnDropout, *, last: bool) -> None:
        super().__init__()
        self.first = first
        self.last = last
        self.rate = first.rate

    def draw(self, inputs: Tensor) -> Tensor:
        """bool, of the shape of `inputs`, or a seed: what `first` drew."""
        drawn = self.first.dropped
        assert drawn is not None
        if self.last:
            self.first.dropped = None
        return drawn

    draw_seed = draw

    def forward(self, inputs: Tensor) -> Tensor:
        """Any shape -> the same, with the mask of `first`."""
        if not self.training:
            return inputs
        return inputs.masked_fill(self.draw(inputs), 0) / (1 - self.rate)
