"""What a sample costs in computation, for balancing ranks: a sum over tokens, tiles and pairs."""

from dataclasses import dataclass, replace
from typing import Any

from internvl.config import Recipe
from internvl.data.records import PackedBatch, PairBatch, Unit
from internvl.plan import time
from internvl.plan.work import Sequences, Work, work_of

_UNITS = {
    "token": Work(rows=Sequences(0, 1, 0)),
    "attended_pair": Work(rows=Sequences(0, 0, 1)),
    "tile": Work(tiles=1),
    "supervised": Work(supervised=1),
}
"""A step that holds one of each thing and nothing else."""


@dataclass(frozen=True)
class Costs:
    """FLOPs of a step per token, pair of tokens, tile and supervised token."""

    token: float = 0.0
    attended_pair: float = 0.0
    tile: float = 0.0
    supervised: float = 0.0

    def of_work(self, work: Work) -> float:
        """Returns the FLOPs of rows of conversations; padding is left out."""
        return (
            self.token * work.rows.tokens
            + self.attended_pair * work.rows.attended_pairs
            + self.tile * work.tiles
            + self.supervised * work.supervised
        )

    def of_unit(self, unit: Any) -> float:
        """Returns the FLOPs of a unit; pairs of an image and a caption all count 1."""
        return self.of_work(unit_work(unit)) if isinstance(unit, Unit) else 1.0

    def of_batch(self, batch: PackedBatch | PairBatch) -> float:
        """Returns the FLOPs of a packed row; the pairs of a batch of pairs."""
        if isinstance(batch, PackedBatch):
            return self.of_work(work_of(batch))
        return float(batch.num_samples)


def unit_work(unit: Unit) -> Work:
    """Counts what a unit asks for in a row."""
    prefix = unit.prefix
    branches = [len(example.input_ids) - prefix for example in unit.examples]
    # Every token of a branch sees the prefix too.
    attended = prefix * (prefix + 1) / 2 + sum(n * prefix + n * (n + 1) / 2 for n in branches)
    supervised = sum(example.num_supervised for example in unit.examples)
    row = Sequences(0, unit.num_tokens, attended)
    return Work(len(unit.examples), unit.num_tiles, supervised, row)


def costs_of(recipe: Recipe, model: Any) -> Costs:
    """Counts the FLOPs of a chat model by what a row holds.

    Args:
        model: on the meta device, as `plan.model_of` builds it; any model of pairs costs nothing.
    """
    if not recipe.objective.rows_are_packed:
        return Costs()
    # Counted with all that a step repeats, and attention at the rate that it reaches.
    nothing = time.computed_flops(recipe, model, Work())
    flops = {
        name: time.computed_flops(recipe, model, work) - nothing for name, work in _UNITS.items()
    }
    return replace(Costs(), **flops)
