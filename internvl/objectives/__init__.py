"""What is minimized: the only difference between kinds of training."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import Dataset

from internvl.data.loader import Read
from internvl.data.records import Batch
from internvl.data.sources import Source
from internvl.objectives import retrieval, sft


class Objective(Protocol):
    """How samples become batches, what a batch counts, and the SUM of each loss term.

    Units and batches are of the objective's own kind: whatever its reader makes, it takes.
    """

    weights: dict[str, float]
    """Weight of every term in the total."""

    def reader(self, files: Sequence[Source], seed: int) -> Dataset[Read]:
        """What loader workers run: references of an order (`UnitRef`) to encoded units.

        Args:
            seed: of what is random in a unit, together with its epoch and sample.
        """
        ...

    def batches(self, units: Sequence[Any]) -> Sequence[Batch]:
        """The micro-batches of one step."""
        ...

    def describe(self, batches: Sequence[Any]) -> str:
        """What the first step holds, for the log: its size, and how its first samples read."""
        ...

    def warmup_batches(self, lengths: Sequence[int]) -> Sequence[Batch]:
        """Made-up batches that together have every shape for which blocks are compiled.

        Args:
            lengths: that rows are padded to.
        """
        ...

    def counts(self, batch: Any) -> dict[str, float]:
        """What each term is averaged over, on CPU."""
        ...

    def begin_step(self, model: Any, batches: Iterator[Any], counts: Mapping[str, float]) -> None:
        """Before the backward passes of a step, under autocast: for a loss over the whole global
        batch, which needs every batch's features (without gradient) before the first of them.

        Args:
            batches: the step's batches, each on the model's device once it is reached.
            counts: of every term, over all batches and ranks.
        """
        ...

    def __call__(self, model: Any, batch: Any) -> dict[str, Tensor]:
        """The sum of each term over a batch that is on the model's device."""
        ...


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "sft": sft.Sft,
    "retrieval": retrieval.RetrievalObjective,
    "stage2": retrieval.Stage2,
}
