"""Objectives: the loss terms of a training, its batches and their counts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import Dataset

from internvl.data.loader import Read
from internvl.data.records import Batch
from internvl.data.sources import Source
from internvl.objectives import mpo, retrieval, sft
from internvl.objectives.run_start import RunStart


class Objective(Protocol):
    """Makes batches of samples; computes the counts and the SUM of each loss term.

    Types of units and batches are the objective's: it takes what its reader makes.
    """

    weights: dict[str, float]
    """Weight of every term in the total."""

    def reader(self, files: Sequence[Source], seed: int) -> Dataset[Read]:
        """Returns the data set that loader workers read: `UnitRef` -> encoded units.

        Args:
            seed: of the random numbers of a unit, together with its epoch and sample.
        """
        ...

    def batches(self, units: Sequence[Any]) -> Sequence[Batch]:
        """Makes the micro-batches of one step."""
        ...

    def describe(self, batches: Sequence[Any]) -> str:
        """Renders a step for the log: its size, and the text of its first samples."""
        ...

    def warmup_batches(self, lengths: Sequence[int]) -> Sequence[Batch]:
        """Makes synthetic batches that have every shape for which blocks are compiled.

        Args:
            lengths: padded lengths of rows, in tokens.
        """
        ...

    def empty_batch(self, lengths: Sequence[int]) -> Batch:
        """Makes a batch without samples that runs every module and counts nothing.

        Args:
            lengths: padded lengths of rows, in tokens; empty if rows are not padded.
        """
        ...

    def counts(self, batch: Any) -> dict[str, float]:
        """Returns the number of items that each term is averaged over, from a batch on the CPU."""
        ...

    def begin_step(self, model: Any, batches: Iterator[Any], counts: Mapping[str, float]) -> None:
        """Prepares a step, under autocast: a loss over the global batch encodes all features here.

        Args:
            batches: the step's batches, each copied to the model's device when it is iterated.
            counts: of every term, over all batches and ranks.
        """
        ...

    def __call__(self, model: Any, batch: Any) -> dict[str, Tensor]:
        """Returns the sum of each term, float32 (), over a batch on the model's device."""
        ...

    def begin_run(self, start: RunStart) -> None:
        """Prepares for the run's next step; collective, like all below."""
        ...

    def end_step(self, means: dict[str, float], applied: bool) -> dict[str, float]:
        """Ends a step; returns more metrics of it.

        Args:
            means: of the terms, over the whole step.
            applied: False if the guard refused the update.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of the objective, as plain values; {} for nothing."""
        ...

    def restore(self, state: Any) -> None:
        """Restores what `state` returned. Raises RunError if it is damaged."""
        ...


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "sft": sft.Sft,
    "retrieval": retrieval.RetrievalObjective,
    "stage2": retrieval.Stage2,
    "mpo": mpo.Mpo,
}
