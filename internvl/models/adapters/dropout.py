"""LoRA's dropout with masks that several layers use and that a backward pass can apply."""

import torch
from torch import Tensor, nn

from internvl.models.adapters import seeded_dropout


class DrawnDropout(nn.Module):
    """Dropout that returns its mask, for layers that share the input and for a backward pass."""

    def __init__(self, rate: float, *, keep: bool = False) -> None:
        super().__init__()
        self.rate = rate
        self.keep = keep
        """True if `RepeatedDropout` layers take the mask from `dropped`."""
        self.dropped: Tensor | None = None

    def draw(self, inputs: Tensor) -> Tensor:
        """Draws a mask: bool, shape of `inputs`, true where it becomes zero."""
        return self._drawn(torch.empty_like(inputs, dtype=torch.bool).bernoulli_(self.rate))

    def draw_seed(self, inputs: Tensor) -> Tensor:
        """Draws the seed, int32 (2,), of a mask that is not kept, see seeded_dropout.py."""
        return self._drawn(seeded_dropout.seed(inputs.device))

    def _drawn(self, mask: Tensor) -> Tensor:
        # For nobody it would only hold memory.
        self.dropped = mask if self.keep else None
        return mask

    def forward(self, inputs: Tensor) -> Tensor:
        """Any shape -> the same, some entries zero and the others scaled by 1 / (1 - rate)."""
        if not self.training or self.rate == 0:
            return inputs
        if seeded_dropout.used(inputs):
            return seeded_dropout.drop(inputs, self.draw_seed(inputs), self.rate)
        # Not F.dropout, whose mask nobody can have.
        return inputs.masked_fill(self.draw(inputs), 0) / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class RepeatedDropout(nn.Module):
    """Repeats the mask that `first` drew in this forward pass; the last user frees it."""

    def __init__(self, first: DrawnDropout, *, last: bool) -> None:
        super().__init__()
        self.first = first
        self.last = last
        self.rate = first.rate

    def draw(self, inputs: Tensor) -> Tensor:
        """Returns what `first` drew: a bool mask, shape of `inputs`, or a seed."""
        drawn = self.first.dropped
        assert drawn is not None
        # Freed, or a mask for each layer would stay in memory until the next step.
        if self.last:
            self.first.dropped = None
        return drawn

    draw_seed = draw

    def forward(self, inputs: Tensor) -> Tensor:
        """Any shape -> the same, with the mask of `first`."""
        if not self.training:
            return inputs
        if seeded_dropout.used(inputs):
            return seeded_dropout.drop(inputs, self.draw_seed(inputs), self.rate)
        return inputs.masked_fill(self.draw(inputs), 0) / (1 - self.rate)
