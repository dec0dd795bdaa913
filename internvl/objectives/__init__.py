"""What is minimized: the only difference between kinds of training."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import Dataset

from internvl.data.loader import Read
from internvl.data.records import BadSample, PackedBatch, Sample, Tiles, Unit
from internvl.data.sources import Source
from internvl.objectives import sft


class Objective(Protocol):
    """How samples become batches, what a batch counts, and the SUM of each loss term."""

    weights: dict[str, float]
    """Weight of every term in the total."""

    def reader(self, files: Sequence[Source], seed: int) -> Dataset[Read]:
        """What loader workers run: references of an order (`UnitRef`) to encoded units.

        Args:
            seed: of what is random in a unit, together with its epoch and sample.
        """
        ...

    def encode(self, samples: Sequence[Sample], tiles: Tiles | None) -> list[Unit | BadSample]:
        """Samples of the same images, and their tiles, to units."""
        ...

    def batches(self, units: Sequence[Unit]) -> list[PackedBatch]:
        """The micro-batches of one step."""
        ...

    def describe(self, batches: Sequence[PackedBatch]) -> str:
        """What the first step holds, for the log: its size, and how its first samples read."""
        ...

    def warmup_batches(self, lengths: Sequence[int]) -> list[PackedBatch]:
        """Made-up batches that together have every shape for which blocks are compiled.

        Args:
            lengths: that rows are padded to.
        """
        ...

    def counts(self, batch: PackedBatch) -> dict[str, float]:
        """What each term is averaged over, on CPU."""
        ...

    def begin_step(
        self, model: Any, batches: Iterator[PackedBatch], counts: Mapping[str, float]
    ) -> None:
        """Before the backward passes of a step, under autocast: for a loss over the whole global
        batch, which needs every batch's features (without gradient) before the first of them.

        Args:
            batches: the step's batches, each on the model's device once it is reached.
            counts: of every term, over all batches and ranks.
        """
        ...

    def __call__(self, model: Any, batch: PackedBatch) -> dict[str, Tensor]:
        """The sum of each term over a batch that is on the model's device."""
        ...


OBJECTIVES = {"sft": sft.Sft}
