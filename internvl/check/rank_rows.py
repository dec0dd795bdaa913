"""The rows of a run's first step that its most loaded rank gets, for a rehearsal of that rank."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain
from typing import Any, cast

from internvl.config import Recipe
from internvl.data import balance
from internvl.data.balance import Piece
from internvl.data.packing import padded_tokens
from internvl.data.row_steps import row_steps
from internvl.data.sampler import Position, SampleOrder, UnitRef
from internvl.inference.families import FAMILIES
from internvl.inference.opened import OpenedModel
from internvl.objectives import OBJECTIVES
from internvl.objectives.packed import PackedObjective
from internvl.plan.costs import Costs
from internvl.plan.work import FirstStep, first_step


class RankRows:
    """The first step of a run, and what its most loaded rank gets."""

    def __init__(
        self, recipe: Recipe, start: OpenedModel, order: SampleOrder, costs: Costs, num_gpus: int
    ) -> None:
        self.recipe, self.order, self.costs, self.num_gpus = recipe, order, costs, num_gpus
        encoder = FAMILIES[start.files.family].encoder(start, recipe)
        self.objective: Any = OBJECTIVES[recipe.objective.name](
            recipe.objective, recipe.data, encoder
        )
        self.reader = cast(Any, self.objective.reader(order.files, recipe.seed))
        first = 0 if recipe.global_batch_rows else recipe.batch_samples
        self.refs = order.between(0, first)
        # Sizes alone: only one rank's images are cut into tiles.
        self.reader.pixels = not recipe.objective.rows_are_packed
        self.read = [self._pieces(ref) for ref in self.refs]
        """Pieces of each reference; of rows without pixels."""
        self.rows = self._dealt()
        """Rank -> its rows, or its micro-batches together -> (reference, piece)."""
        if recipe.global_batch_rows:
            self.reader.pixels = True
            self.read = self._rows_of_step()
            loads = [sum(map(self.costs.of_unit, row)) for row in self.read]
            self.rows = [
                [[(row, i) for i in range(len(self.read[row]))] for row in rows]
                for rows in balance.deal_rows(loads, num_gpus)
            ]

    def _pieces(self, ref: UnitRef) -> list[Any]:
        units = self.reader[ref].units
        return (
            self.objective.pieces(units) if isinstance(self.objective, PackedObjective) else units
        )

    def _rows_of_step(self) -> list[list[Any]]:
        """Packs the rows of a step of `global_batch_rows`, with their pixels."""
        rows: list[list[Any]] = []

        def keep(groups: Sequence[Sequence[Any]]) -> list[Any]:
            rows.extend(map(list, groups))
            return []

        recipe = self.recipe
        # Without workers: they would read ahead of the one step that is wanted.
        data, num_rows = replace(recipe.data, workers=0), recipe.global_batch_rows
        assert num_rows is not None
        limits: dict[str, Any] = {"num_rows": num_rows, "first": 0, "last": 1}
        steps = row_steps(self.order, self.reader, keep, data, position=Position(), **limits)
        with closing(steps):
            next(steps)
        return rows

    def _dealt(self) -> list[list[list[tuple[int, int]]]]:
        """Deals the step to ranks as training does."""
        places = [
            [
                (i, n)
                for i in range(rank, len(self.refs), self.num_gpus)
                for n in range(len(self.read[i]))
            ]
            for rank in range(self.num_gpus)
        ]
        data = self.recipe.data
        if not self.recipe.objective.rows_are_packed:
            return [[of_rank] for of_rank in places]
        pieces = [
            [
                Piece(self.costs.of_unit(unit), unit.num_tokens, unit.num_tiles)
                for unit in (self.read[i][n] for i, n in of_rank)
            ]
            for of_rank in places
        ]
        limit = data.row_tokens or data.max_tokens
        lengths = sorted({padded_tokens(0, limit), limit})
        dealt = balance.even_rows(pieces, lengths, data.max_tiles)
        return [[[places[rank][i] for rank, i in row] for row in rows] for rows in dealt]

    def batches(self) -> list[Any]:
        """Reads the samples of the most loaded rank and makes its batches."""
        # The longest row decides the memory, and all ranks wait for the costliest.
        rows = max(self.rows, key=self._load)
        if not self.reader.pixels:
            self.reader.pixels = True
            for index in {index for row in rows for index, _ in row}:
                self.read[index] = self._pieces(self.refs[index])
        return self._built(rows)

    def _load(self, rows: Sequence[Sequence[tuple[int, int]]]) -> tuple[int, float]:
        """Returns (tokens of the longest row, cost)."""
        units = [[self.read[i][n] for i, n in row] for row in rows]
        if not self.recipe.objective.rows_are_packed:
            return len(units[0]), 0.0
        longest = max((sum(unit.num_tokens for unit in row) for row in units), default=0)
        return longest, sum(self.costs.of_unit(unit) for row in units for unit in row)

    def counted(self) -> FirstStep | None:
        """Counts the whole step for the plan; None if it has no good sample."""
        rows = list(chain.from_iterable(self.rows))
        # Pairs are cut into micro-batches by the objective, from all of them.
        if not self.recipe.objective.rows_are_packed:
            rows = [list(chain.from_iterable(rows))]
        batches = self._built(rows)
        return first_step(batches, self.objective.weights, len(self.order)) if batches else None

    def _built(self, rows: Sequence[Sequence[tuple[int, int]]]) -> list[Any]:
        units = [[self.read[i][n] for i, n in row] for row in rows if row]
        if self.recipe.objective.rows_are_packed:
            return self.objective.rows(units)
        return self.objective.batches(units[0]) if units else []
