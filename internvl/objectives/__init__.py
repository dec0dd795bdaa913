"""What is minimized: the only difference between kinds of training."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from internvl.data.records import BadSample, PackedBatch, Sample, Tiles, Unit
from internvl.objectives import sft


class Objective(Protocol):
    """How samples become batches, what a batch counts, and the SUM of each loss term."""

    weights: dict[str, float]
    """Weight of every term in the total."""

    def encode(self, samples: Sequence[Sample], tiles: Tiles | None) -> list[Unit | BadSample]:
        """Samples of the same images, and their tiles, to units."""
        ...

    def batches(self, units: Sequence[Unit]) -> list[PackedBatch]:
        """The micro-batches of one step."""
        ...

    def counts(self, batch: PackedBatch) -> dict[str, float]:
        """What each term is averaged over, on CPU."""
        ...

    def __call__(self, model: Any, batch: PackedBatch) -> dict[str, Tensor]:
        """The sum of each term over a batch that is on the model's device."""
        ...


OBJECTIVES = {"sft": sft.Sft}
